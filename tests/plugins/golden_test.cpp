#include "tests/golden.h"

#include <limits>
#include <set>
#include <string>

#include "gradient_ranks.h"
#include "plugins/weights_defaults.h"
#include "simulation.h"

namespace distro::plugins {
namespace {

using kernels::DType;
using kernels::Isa;
using test::GoldenLine;
using test::Hash;
using test::Numbers;

// A rank each, so that the constants are those of every instruction set of this CPU.
constexpr Isa kIsas[] = {Isa::scalar, Isa::avx2, Isa::avx512};

std::string hex(const std::vector<std::byte>& bytes) {
  return fmt::format("{:02x}", fmt::join(bytes, " "));
}

// clang-format off
/// Of all records; of W of all ranks; of x of all ranks.
constexpr GoldenLine<3> kWeights[] = {
    {"f32 k6 b1 t1 s0", {0xbe3ca5189caa5f96, 0x05d413d7387a090b, 0x1b7521425b1962ec}},
    {"f32 k6 b1 t1 s12", {0x56d58eaf2a0ba1a9, 0x05d413d7387a090b, 0xb61f65b84ac5c2b2}},
    {"f32 k6 b1 t16 s0", {0x55c55ae171f14f3b, 0xf15c42108bde7cee, 0xe2597d765300c5d4}},
    {"f32 k6 b1 t16 s12", {0xace7c8fd7de7d3c1, 0xf15c42108bde7cee, 0xe3758f7ecf70d197}},
    {"f32 k6 b32 t1 s0", {0x009717faf6f164be, 0xb3f68a6fdc062263, 0xd19824eeba221ccf}},
    {"f32 k6 b32 t1 s12", {0xfd37c987aad390b8, 0xb3f68a6fdc062263, 0x67b3196c35e9b478}},
    {"f32 k6 b32 t16 s0", {0xd9127050ebfe9415, 0x31eecdd7bc69f1cd, 0x8d3ca12c0e5693d0}},
    {"f32 k6 b32 t16 s12", {0x7754ad1312056ddf, 0x0817f313afabee6c, 0x23323450a2106d0d}},
    {"f32 k10 b1 t1 s0", {0x38ef017241518656, 0x26edcc28324e1d6e, 0x364e6da01e2cb58e}},
    {"f32 k10 b1 t1 s12", {0xe344f27a584124a5, 0x26edcc28324e1d6e, 0xddfcb0715df03c95}},
    {"f32 k10 b1 t16 s0", {0x6db5b5b3f6994f2e, 0xde593b193afee03e, 0xeb38108b1bdeebab}},
    {"f32 k10 b1 t16 s12", {0x83207d12d710545c, 0xde593b193afee03e, 0x8dad0966cc61939b}},
    {"f32 k10 b32 t1 s0", {0x7facb955492fbc5f, 0x94561ef0eb5c46f1, 0x0334cd00feb7dbba}},
    {"f32 k10 b32 t1 s12", {0x2e09274c1b89f4d2, 0x4d2c34d4b5fa5d22, 0x1bb8c6d18e8a487b}},
    {"f32 k10 b32 t16 s0", {0x0e41a22db7745f5e, 0x5dd0d2a99bd1adac, 0x793e2fccc4afd37f}},
    {"f32 k10 b32 t16 s12", {0x32a3ad8a4c7e6ef1, 0xc014c8db9508a4bc, 0xaed7540a4fdc1b21}},
    {"f32 k32 b1 t1 s0", {0x4235f0334789235a, 0x81e17a2ad5a6b3ab, 0x25a30d2482817e58}},
    {"f32 k32 b1 t1 s12", {0x3de22d4061892848, 0x81e17a2ad5a6b3ab, 0x7a188f000a1fe595}},
    {"f32 k32 b1 t8 s0", {0x55c62d4d87dcaba8, 0xc0edfeabefffa2d4, 0xd7b7bb35d2ef73be}},
    {"f32 k32 b1 t8 s12", {0x7842e502bf4723e2, 0xc0edfeabefffa2d4, 0x2ba886d4eba0bac3}},
    {"f32 k32 b32 t1 s0", {0xf8d87d916d7fefd0, 0x90e3571291f61e94, 0x2458d7e6ddace66c}},
    {"f32 k32 b32 t1 s12", {0x89a8de8eb2b84970, 0x97ef68e3bc455e0f, 0x9420767277ecedc7}},
    {"f32 k32 b32 t8 s0", {0xdddef274fefa40f5, 0xa8d8611adc022cee, 0xe8adb3701578ec80}},
    {"f32 k32 b32 t8 s12", {0xba70e3bfff82ee9c, 0xc1c3e3b6e1ba6772, 0xab5bb96b0433c0fd}},
    {"f32 k4096 b1 t1 s0", {0x247bc187f9ec6d44, 0x9804c8a87fc634c1, 0xeb75c2a4735f1dbd}},
    {"f32 k4096 b1 t1 s12", {0x5dd48470181c7d92, 0x9804c8a87fc634c1, 0x8a66420cc2abe826}},
    {"f32 k4096 b32 t1 s0", {0x6943f925b0b94455, 0x1480ac75a0085a92, 0x1480ac75a0085a92}},
    {"f32 k4096 b32 t1 s12", {0x7022241f00832f91, 0x8372ff8772cd01a4, 0x1ead9c873fbfd43e}},
    {"bf16 k6 b1 t1 s0", {0x357fab3cfa75b81b, 0x63ec223de5c92a59, 0x2389f13976f237d4}},
    {"bf16 k6 b1 t1 s12", {0x0716fd0ca2bfb8b9, 0x63ec223de5c92a59, 0x590f75310abf022c}},
    {"bf16 k6 b1 t16 s0", {0xe8948aa1fceedace, 0x4f25994ceea4573d, 0x79321d10953e25f9}},
    {"bf16 k6 b1 t16 s12", {0x1534abdd72a5a81a, 0x4f25994ceea4573d, 0x15aaa6473b4a9170}},
    {"bf16 k6 b32 t1 s0", {0xb3ebabf5aa567cc9, 0x9e336f6a724888fc, 0x6ca0fd130e893c20}},
    {"bf16 k6 b32 t1 s12", {0x3b7997b62678250e, 0x13b7248c975e6f22, 0x1bd14d14b170544d}},
    {"bf16 k6 b32 t16 s0", {0xaf93f4e0bcb51b89, 0xbd87860b6aab0458, 0x52ccf061d9ffec4f}},
    {"bf16 k6 b32 t16 s12", {0x8faed62079431674, 0x0466701745245dde, 0x5db42965ae22e527}},
    {"bf16 k10 b1 t1 s0", {0x8f2416400190d5b4, 0x84e831935ef84be4, 0xa33d887f197c7494}},
    {"bf16 k10 b1 t1 s12", {0xca864e71ed52047d, 0x84e831935ef84be4, 0xa891e25d217123a0}},
    {"bf16 k10 b1 t16 s0", {0x2901ebea958e3e0c, 0x5040c975266ce204, 0x2e96ecd561ce97e9}},
    {"bf16 k10 b1 t16 s12", {0xe807bee527c1bf68, 0xa132b16be179a462, 0xb1d4b62cd3f9f8b3}},
    {"bf16 k10 b32 t1 s0", {0xd900ef67359fe600, 0xb0e61efb1429ded3, 0x971ee27d5fb09ba7}},
    {"bf16 k10 b32 t1 s12", {0x1116af7893c27fa6, 0x8676d9fb65af7ca6, 0xa99e2c6df415d7cb}},
    {"bf16 k10 b32 t16 s0", {0xbf9ac43e2e615736, 0xb817a5bec939ae9f, 0x2d52dd038d167407}},
    {"bf16 k10 b32 t16 s12", {0x504b6aeab004d7cd, 0xd7e8d739900bfe34, 0x1e73285572cf7c1e}},
    {"bf16 k32 b1 t1 s0", {0x6696d7930e997550, 0x10f17344cc7ff504, 0xc349eb81e08d0de0}},
    {"bf16 k32 b1 t1 s12", {0x8a74824c60d1892c, 0x9f551787214a92dd, 0x5783b3eea87e6a00}},
    {"bf16 k32 b1 t8 s0", {0xa0cc66f46885491a, 0xcb95252bfc3ed24a, 0x3791c20d9c730336}},
    {"bf16 k32 b1 t8 s12", {0x641ece978fbdbe9d, 0x3e0b3327cf702824, 0x2c5a4278be788de3}},
    {"bf16 k32 b32 t1 s0", {0x1113e3b618beeb0f, 0xa484145bbf83e5d1, 0x23beafd873c596d8}},
    {"bf16 k32 b32 t1 s12", {0xf73e2319f2b4419e, 0xa732301bffd4270e, 0xe308d7482492712e}},
    {"bf16 k32 b32 t8 s0", {0x84b63205ada75d67, 0xd47b53172d05cad1, 0x98ec74b5881fa9e1}},
    {"bf16 k32 b32 t8 s12", {0x64497f198468955a, 0x27129a4ebd465010, 0x03e9a4633149db18}},
    {"bf16 k4096 b1 t1 s0", {0x87c3f405efa2c5e9, 0x601b8edaf8d7926a, 0x5eaa074f039c564a}},
    {"bf16 k4096 b1 t1 s12", {0x4f06dbec95cd93ae, 0x3254c738609714a8, 0xf0cb19ba735e51dc}},
    {"bf16 k4096 b32 t1 s0", {0x850ed7d748289743, 0x66d41b84149c8d40, 0xf6ac613f8fe377c5}},
    {"bf16 k4096 b32 t1 s12", {0x304aa9776dc21fb9, 0x9067727d79e7d345, 0x382e754694801779}},
    {"mixed k6 b1 t1 s0", {0x3d25f51e52065373, 0x199d134bf3a5d3c7, 0x7a656b62423960cf}},
    {"mixed k6 b1 t1 s12", {0x9a523447bb95e8e5, 0x199d134bf3a5d3c7, 0xbc49b95c13554efe}},
    {"mixed k6 b1 t16 s0", {0x74e71861403eb6e9, 0x46465bca2cd9aa90, 0xf5023afced850d8f}},
    {"mixed k6 b1 t16 s12", {0xf97bd97a173c9f23, 0x46465bca2cd9aa90, 0x6a2a90557386b536}},
    {"mixed k6 b32 t1 s0", {0x74cf002a1febd39d, 0xd138f6b4b891ec75, 0xa678d92a233bf891}},
    {"mixed k6 b32 t1 s12", {0x363689e5804f1d1c, 0xd138f6b4b891ec75, 0x5b3411bfd1cb7697}},
    {"mixed k6 b32 t16 s0", {0x127bd4e6be83952a, 0x0adda1ea1e02020d, 0xfd2961139efd7199}},
    {"mixed k6 b32 t16 s12", {0x3bf5db7c10bfb8ee, 0x8257503dcf381065, 0xaebe66670bde16d1}},
    {"f32 k6 b1 t1 s0 r16", {0xca8286fd7dc34d9f, 0x3a9b65866f656b18, 0x37088a23d590b0ee}},
    {"f32 k6 b1 t1 s12 r16", {0xadfd81243aa957d6, 0x3a9b65866f656b18, 0x06ce915a0599a4c2}},
    {"f32 k6 b1 t16 s0 r16", {0x2c7cdd48298343c6, 0xf15c42108bde7cee, 0xdf2e19767d22b535}},
    {"f32 k6 b1 t16 s12 r16", {0x2d5a21c9aa560f57, 0xf15c42108bde7cee, 0xd02035cc9475b09a}},
    {"f32 k6 b32 t1 s0 r16", {0x9856789646319eb5, 0x3b1f29311d3913fe, 0x59a0ec60603aa216}},
    {"f32 k6 b32 t1 s12 r16", {0x17de9da1c9ed004b, 0x3b1f29311d3913fe, 0x11b44696c37e94f7}},
    {"f32 k6 b32 t16 s0 r16", {0x6b3c164f0f82272a, 0x9470eacf846fb1cb, 0x67cac55f91883f4a}},
    {"f32 k6 b32 t16 s12 r16", {0x24999d4467505b14, 0x9470eacf846fb1cb, 0xd8ba40fc8b758f9a}},
    {"bf16 k6 b1 t1 s0 r16", {0x0af693fe9803c9c1, 0xc9fb3cf1ddf4e980, 0x8fbac734c80d21e5}},
    {"bf16 k6 b1 t1 s12 r16", {0x8bebb3ef6c92b337, 0xc9fb3cf1ddf4e980, 0x1f416c2b96323ce2}},
    {"bf16 k6 b1 t16 s0 r16", {0xa12856ef7b1cb9ff, 0x4f25994ceea4573d, 0x68dcc53233c4d58c}},
    {"bf16 k6 b1 t16 s12 r16", {0x2c7e3307e89e16ec, 0x4f25994ceea4573d, 0x01d13fed4072c0a2}},
    {"bf16 k6 b32 t1 s0 r16", {0xd9ab7db507b752c1, 0x7dddd2b8aea0999e, 0x0de3a8f4b03201f3}},
    {"bf16 k6 b32 t1 s12 r16", {0x0d32c17300dd7a04, 0x34a000c85732d5ae, 0xffb4c6ee37774189}},
    {"bf16 k6 b32 t16 s0 r16", {0x9eccfe1b25ded519, 0xd0e0c8f7f48d25e9, 0xd2df890d31b5d5e6}},
    {"bf16 k6 b32 t16 s12 r16", {0x67a42f04e09df423, 0x94e2e9a68d95db7b, 0xf137b93d32666dcb}},
    {"mixed k6 b1 t1 s0 r16", {0x4144213a383b326b, 0x199d134bf3a5d3c7, 0xb8d6535949650cd6}},
    {"mixed k6 b1 t1 s12 r16", {0xa2e1b664ba18714a, 0x199d134bf3a5d3c7, 0x3c5750c7d957dfaa}},
    {"mixed k6 b1 t16 s0 r16", {0x9c6a38b9891a229c, 0x46465bca2cd9aa90, 0xb81ca5e1311f9f18}},
    {"mixed k6 b1 t16 s12 r16", {0xe44294b01e60459b, 0x46465bca2cd9aa90, 0x9855967e70c0a515}},
    {"mixed k6 b32 t1 s0 r16", {0xac02c02b27a71cfa, 0x48a88ecbc01359a9, 0x1d29ec459cd3d8f5}},
    {"mixed k6 b32 t1 s12 r16", {0x2fe1680e6d1d510f, 0x48a88ecbc01359a9, 0xa381a3d82e7adfb0}},
    {"mixed k6 b32 t16 s0 r16", {0x27e75392a8c2ff49, 0xff801aac87d55d80, 0x0d74aa4bd20a9935}},
    {"mixed k6 b32 t16 s12 r16", {0xc8e9e28711f1fb31, 0xad7b23da7fde0e77, 0x8f6eb817e2109d8a}},
};
// clang-format on

TEST(WeightsGolden, EveryMachineHasTheseBits) {
  struct Types {
    const char* name;
    std::vector<DType> dtypes;
  };
  const Types all_types[] = {{"f32", {DType::f32}},
                             {"bf16", {DType::bf16}},
                             {"mixed", {DType::f16, DType::f64, DType::bf16, DType::f32}}};
  test::Golden<3> golden(kWeights);
  for (const auto& [type_name, dtypes] : all_types) {
    std::vector<Module::Tensor> tensors;
    for (const std::size_t elements : {8197U, 300U, 0U, 1U, 17U, 4095U}) {
      tensors.push_back({elements, dtypes[tensors.size() % dtypes.size()]});
    }
    for (const std::uint32_t k : {6U, 10U, 32U, 4096U}) {
      if (dtypes.size() > 1 && k != 6) {
        continue;
      }
      for (const std::uint32_t value_bits : {1U, 32U}) {
        for (const std::size_t turns : std::set{std::size_t{1}, default_turns(k)}) {
          for (const auto& [spread_steps, residual_bits] :
               {std::pair{0U, 32U}, {12U, 32U}, {0U, 16U}, {12U, 16U}}) {
            if (residual_bits == 16 && k != 6) {
              continue;
            }
            // With a share of 1 R is what x is ahead of W.
            const float share = k == 10 ? 1.0F : 0.6F;
            WeightsConfig config{k, value_bits};
            config.spread_steps = spread_steps;
            config.residual_bits = residual_bits;
            Simulation simulation(tensors, config,
                                  {.ranks = std::size(kIsas),
                                   .gain = 1.7F,
                                   .share = share,
                                   .turns = turns,
                                   .isas = {std::begin(kIsas), std::end(kIsas)}});
            Hash records;
            for (std::size_t step = 0; step < turns + 4; ++step) {
              simulation.step(0.02);
              for (const Step& last : simulation.last) {
                records.add(last.record);
                records.add(last.move_mean);
              }
            }
            simulation.drain();
            Hash w;
            Hash x;
            for (std::size_t rank = 0; rank < simulation.ranks(); ++rank) {
              for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
                w.add(simulation.codecs[rank].reference(tensor));
                x.add(simulation.modules[rank].bytes()[tensor]);
              }
            }
            golden.see(fmt::format("{} k{} b{} t{} s{}{}", type_name, k, value_bits, turns,
                                   spread_steps, residual_bits == 16 ? " r16" : ""),
                       {records.value(), w.value(), x.value()});
          }
        }
      }
    }
  }
  golden.finish();
}

// clang-format off
/// Of all records; of the decoded gradients; of the residuals of all ranks.
constexpr GoldenLine<3> kGradients[] = {
    {"ef dct k6 b1", {0xe8c5d2508c8fc01a, 0x4f86634079a4b4be, 0x8bcd77121a08e442}},
    {"ef dct k6 b32", {0xace191d2c70ea799, 0xc40c12f95a5983c6, 0xe28ab57fb19d5e08}},
    {"ef dct k48 b1", {0xed98d1c8fd72d973, 0xf6a8239299758836, 0x11703ed971e42f80}},
    {"ef dct k48 b32", {0x6700b4270d000c5f, 0xe10f164525084775, 0x5f280e6069a8545b}},
    {"ef dct k4096 b1", {0x8117dd4f91fec7c5, 0xe3fc19f31b097c34, 0x1ec2642df7acf684}},
    {"ef dct k4096 b32", {0x411427c18193904c, 0x01494b1f55f10392, 0xcd24b3467d250aeb}},
    {"ef none k6 b1", {0x45eb8d6446e3cadd, 0xe3925a950d34c461, 0xb3b90b59539cf773}},
    {"ef none k6 b32", {0xc55e72a8f9ef2828, 0x480025a9098dfb04, 0x9f01c45d206711ee}},
    {"ef none k48 b1", {0x99f195f24eb6174b, 0xcc6c287d8a349ae2, 0x7e34a6f4be34eacd}},
    {"ef none k48 b32", {0xa466975960ba1b23, 0x0f5ffa93e104ae13, 0x49ced533424b69f1}},
    {"ef none k4096 b1", {0x6437866bded5e705, 0x1309cbb9e4d66a0d, 0xe7d0c89c6dc41dc9}},
    {"ef none k4096 b32", {0x89daba5cea35700c, 0xda75be009b939f3a, 0xffefb6c60914d287}},
    {"demo dct k6 b1", {0xe8c5d2508c8fc01a, 0x9f909e912bf8ab00, 0x8bcd77121a08e442}},
    {"demo dct k6 b32", {0xace191d2c70ea799, 0xb69a15bfb941ec0a, 0xe28ab57fb19d5e08}},
    {"demo dct k48 b1", {0xed98d1c8fd72d973, 0xfd741ca8dca2ce95, 0x11703ed971e42f80}},
    {"demo dct k48 b32", {0x6700b4270d000c5f, 0x7bd97e6c862b0fa8, 0x5f280e6069a8545b}},
    {"demo dct k4096 b1", {0x8117dd4f91fec7c5, 0x79d91b5219d4e25c, 0x1ec2642df7acf684}},
    {"demo dct k4096 b32", {0x411427c18193904c, 0x29872fe42da90923, 0xcd24b3467d250aeb}},
    {"demo none k6 b1", {0x45eb8d6446e3cadd, 0x633a54296bf9c88d, 0xb3b90b59539cf773}},
    {"demo none k6 b32", {0xc55e72a8f9ef2828, 0x633a54296bf9c88d, 0x9f01c45d206711ee}},
    {"demo none k48 b1", {0x99f195f24eb6174b, 0xe19cfab4429e2d3a, 0x7e34a6f4be34eacd}},
    {"demo none k48 b32", {0xa466975960ba1b23, 0x207d8bd3e821dfae, 0x49ced533424b69f1}},
    {"demo none k4096 b1", {0x6437866bded5e705, 0x986c86c7737b9aee, 0xe7d0c89c6dc41dc9}},
    {"demo none k4096 b32", {0x89daba5cea35700c, 0x29872fe42da90923, 0xffefb6c60914d287}},
};
// clang-format on

TEST(GradientGolden, EveryMachineHasTheseBits) {
  const std::vector<GradientTensor> tensors{
      {{70, 130}, DType::f32}, {{200}, DType::bf16},        {{}, DType::f32},
      {{5, 0, 3}, DType::f32}, {{32, 3, 7, 7}, DType::f64}, {{1, 97, 1, 61}, DType::f16},
      {{1}, DType::f64},       {{64, 64}, DType::f32},      {{2, 1500}, DType::bf16}};
  constexpr std::uint32_t kBad = 1;
  test::Golden<3> golden(kGradients);
  for (const GradientMethod method : {GradientMethod::ef, GradientMethod::demo}) {
    for (const Transform transform : {Transform::dct, Transform::none}) {
      for (const std::uint32_t k : {6U, 48U, 4096U}) {
        for (const std::uint32_t value_bits : {1U, 32U}) {
          std::vector<GradientRank> ranks;
          for (const Isa isa : kIsas) {
            ranks.emplace_back(tensors,
                               GradientConfig{method, k, value_bits, transform, 0.9F, isa});
          }
          Numbers numbers(1);
          Hash records;
          Hash decoded;
          Hash residuals;
          for (std::size_t step = 0; step < 3; ++step) {
            std::vector<EncodedGradients> encoded;
            std::vector<ParsedRecord> parsed;
            for (GradientRank& rank : ranks) {
              for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
                for (std::size_t i = 0; i < rank.gradients.tensors()[tensor].elements; ++i) {
                  rank.gradients.set(tensor, i, static_cast<double>(numbers.wide(-8, 2)));
                }
              }
              if (step == 1 && encoded.empty()) {
                rank.gradients.set(kBad, 3, std::numeric_limits<double>::infinity());
              }
              encoded.push_back(rank.encode());
              records.add(encoded.back().record);
              parsed.push_back(rank.codec.parse(encoded.back().record));
            }
            const std::vector<std::uint32_t> non_finite = encoded[0].non_finite;
            for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
              ranks[rank].codec.take_back(encoded[rank].own, non_finite,
                                          ranks[rank].residual_pointers());
              const Module out = decode(ranks[rank].codec, ranks[rank].gradients,
                                        equal_weights(parsed), non_finite);
              for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
                decoded.add(out.bytes()[tensor]);
                residuals.add(ranks[rank].residuals[tensor].coefficients);
              }
            }
          }
          golden.see(fmt::format("{} {} k{} b{}", method == GradientMethod::ef ? "ef" : "demo",
                                 transform == Transform::dct ? "dct" : "none", k, value_bits),
                     {records.value(), decoded.value(), residuals.value()});
        }
      }
    }
  }
  golden.finish();
}

/// The record of one tensor of eight weights, of which two are kept, that moved so.
std::string record_of(std::uint32_t value_bits, const std::vector<double>& moves) {
  Module module({{moves.size(), DType::f32}});
  WeightsCodec codec(module.geometry(), {1024, value_bits});
  codec.begin(module.views());
  for (std::size_t i = 0; i < moves.size(); ++i) {
    module.set(0, i, moves[i]);
  }
  return hex(codec.encode(module.views(), 1, 1.0F).record);
}

// Bits are written from the lowest of a byte on; these comments have them in the order of writing.
TEST(WeightsGolden, RecordsWrittenOut) {
  const std::vector<double> moves{0, 0.5, 0, 0.25, 0, 0, -0.75, 0};
  EXPECT_EQ(record_of(1, moves),
            "04 00 00 00 "  // bytes that follow
            "20 3f "        // scale: (0.5 + 0.75) / 2 as bf16
            "1d 01");       // 1: all two; 0 1: weight 1, Rice code of parameter 1 of the gap 1;
                            // 110 0: weight 6, of the gap 4; 0 1: signs; padding
  EXPECT_EQ(record_of(32, moves),
            "09 00 00 00 "                  // bytes that follow
            "1d 00 00 80 1f 00 00 a0 5f");  // 1; 0 1; 110 0; 0x3f000000, 0xbf400000: the values
  EXPECT_EQ(record_of(1, {0, 0.5, 0, 0, 0, 0, 0, 0}),
            "03 00 00 00 "  // bytes that follow
            "00 3f "        // scale: 0.5
            "12");          // 0 10: fewer than two, namely 1; 0 1: weight 1; 0: sign; padding
  EXPECT_EQ(record_of(1, {0, 0, 0, 0, 0, 0, 0, 0}),
            "03 00 00 00 "  // bytes that follow
            "00 00 "        // scale: nothing is sent
            "00");          // 0 00: no entry; padding
}

TEST(GradientGolden, RecordsWrittenOut) {
  const auto record_of_eight = [](GradientConfig config) {
    config.k = 1024;
    GradientRank rank({{{8}, DType::f32}}, config);
    for (std::size_t i = 0; i < 8; ++i) {
      rank.gradients.set(0, i, static_cast<double>(i + 1));
    }
    return hex(rank.encode().record);
  };
  EXPECT_EQ(record_of_eight({}),
            "03 00 00 00 "  // bytes that follow
            "19 41 "        // scale: (12.7 + 6.4) / 2 as bf16
            "41");          // 1: all two; 0 0, 0 0: coefficients 0 and 1; 0 1: signs; padding
  EXPECT_EQ(record_of_eight({.transform = Transform::none}),
            "04 00 00 00 "  // bytes that follow
            "f0 40 "        // scale: (7 + 8) / 2
            "0f 00");       // 1: all two; 1110 0, 0 0: elements 6 and 7; 0 0: signs; padding
}

}  // namespace
}  // namespace distro::plugins
