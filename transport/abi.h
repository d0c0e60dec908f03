/* The C interface of a third-party transport for torch-distro, version 1.
 *
 * A transport is a shared library that exports one function, `distro_transport_plugin`. It carries
 * frames (opaque bytes of limited size) between the ranks of a group. It is chosen by
 * DISTRO_TRANSPORT=/path/to/library.so on every rank; docs/transports.md is the guide, and
 * tests/transport/example_transport/ a complete one.
 *
 * What a transport promises
 *   A frame arrives whole and unaltered, at the rank that it was sent to, told with the rank that
 *   sent it, and after the frames that were sent to that rank before it. Frames may be lost only
 *   when a connection breaks, which is told by DOWN. A frame that arrives twice does no harm.
 * What torch-distro adds
 *   Messages of any size, cut into frames; numbers, acknowledgements and resending after DOWN and
 *   UP; back-pressure; greetings, so that a frame of a stranger or of another group is refused; the
 *   goodbye of a rank that ends and the abort of one that fails, which are frames like any other;
 *   and the time-outs. A transport needs none of these.
 *
 * Threads. `distro_transport_plugin` may be called by any thread, one at a time. All other
 * functions are called by one thread at a time, for all channels of a process; never in a forked
 * child. They must not block (that thread serves all groups of the process), `open` and `close` for
 * at most about a second. A transport may have threads of its own.
 *
 * Ownership. Memory belongs to the side that made it. Pointers that torch-distro hands in are valid
 * during the call. What a transport hands out is valid until the time said beside it.
 *
 * Errors. Functions return a distro_transport_status. With DISTRO_TRANSPORT_ERROR the group of this
 * rank fails, with the text that `error` was given (what happened, and what to do). No C++
 * exception should leave a function; one that does counts as DISTRO_TRANSPORT_ERROR.
 *
 * Versions. DISTRO_TRANSPORT_ABI changes when an existing meaning changes; a library of another
 * version is refused. Within a version, fields are only ever added at the end of structures, and
 * `struct_size` tells the other side how many there are.
 */
#ifndef DISTRO_TRANSPORT_ABI_H
#define DISTRO_TRANSPORT_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define DISTRO_TRANSPORT_EXPORT __attribute__((visibility("default")))
#else
#define DISTRO_TRANSPORT_EXPORT
#endif

#define DISTRO_TRANSPORT_ABI 1u
#define DISTRO_TRANSPORT_ERROR_BYTES 512u
#define DISTRO_TRANSPORT_ADDRESS_BYTES 1024u

/* One endpoint of a group, of the transport's own making. */
typedef struct distro_transport_channel distro_transport_channel;

typedef enum distro_transport_status {
  DISTRO_TRANSPORT_OK = 0,
  DISTRO_TRANSPORT_AGAIN = 1, /* send: no room now; receive: nothing to tell now. */
  DISTRO_TRANSPORT_GONE = 2,  /* send: there is no connection to that rank now. */
  DISTRO_TRANSPORT_ERROR = 3  /* The channel cannot go on. */
} distro_transport_status;

/* Text of an error, UTF-8, ended by a zero byte; what is longer is cut. */
typedef struct distro_transport_error {
  char text[DISTRO_TRANSPORT_ERROR_BYTES];
} distro_transport_error;

/* What a channel is opened with. Texts are never null; an empty one means "not given". */
typedef struct distro_transport_config {
  size_t struct_size;     /* Bytes of this structure as torch-distro knows it. */
  int32_t rank;           /* This rank, from 0. */
  int32_t world_size;     /* Ranks in the group. */
  uint64_t group;         /* Random number of the group, the same on all its ranks. */
  size_t max_frame_bytes; /* Largest frame that will be sent. */
  int64_t timeout_ms;     /* The group's time-out, milliseconds. For information only: torch-distro
                             gives up by itself. */
  const char* bind;       /* DISTRO_BIND: address or interface to listen on. */
  const char* advertise;  /* DISTRO_ADVERTISE: name or address to tell to peers. */
  uint16_t first_port;    /* DISTRO_PORTS; 0: any. */
  uint16_t last_port;
  int32_t insecure; /* DISTRO_INSECURE. Where it is 0, a transport without authentication and
                       encryption must refuse to be reachable from other hosts. */
} distro_transport_config;

typedef enum distro_transport_event_kind {
  DISTRO_TRANSPORT_FRAME = 1, /* `data` and `size`: a frame of rank `peer`. */
  DISTRO_TRANSPORT_UP = 2,   /* Frames can travel to and from `peer`. Told once for each connection,
                                before its first frame. */
  DISTRO_TRANSPORT_DOWN = 3, /* The connection to `peer` broke, after all frames that arrived over
                                it were told. The transport tries by itself to make another. */
  DISTRO_TRANSPORT_LOST = 4, /* `peer` will never come back, `text` says why. Optional: a rank whose
                                process has ended on the same host, and one that stays DOWN for the
                                group's time-out, is found lost without it. */
  DISTRO_TRANSPORT_SPACE = 5 /* After AGAIN from `send`: there is room again. */
} distro_transport_event_kind;

typedef struct distro_transport_event {
  size_t struct_size; /* Set by torch-distro. */
  int32_t kind;       /* distro_transport_event_kind */
  int32_t peer;       /* The rank that it is about. */
  const void* data;   /* Valid until the next call for this channel. */
  size_t size;        /* Bytes, at most max_frame_bytes. */
  const char* text;   /* Null, or UTF-8 ended by a zero byte, valid until the next call. */
} distro_transport_event;

/* Bytes that this channel has put on and taken from the network since it was opened, with all that
 * the transport adds to the frames. */
typedef struct distro_transport_counters {
  size_t struct_size; /* Set by torch-distro. */
  uint64_t bytes_sent;
  uint64_t bytes_received;
} distro_transport_counters;

/* What a library exports. It must stay valid and constant as long as the library is loaded, which
 * is until the process ends. */
typedef struct distro_transport {
  uint32_t abi;      /* DISTRO_TRANSPORT_ABI. First in every version. */
  uint32_t reserved; /* 0 */
  size_t
      struct_size; /* sizeof(distro_transport) as the library was built. Third in every version. */

  /* Printable ASCII, 1 to 63 characters each. All ranks of a group must have the same; a version
   * should change when what travels changes. */
  const char* name;
  const char* version;

  /* Make a channel that peers can connect to. On OK, *channel is not null. */
  int32_t (*open)(const distro_transport_config* config, distro_transport_channel** channel,
                  distro_transport_error* error);

  /* What peers need to find this channel: printable ASCII, at most DISTRO_TRANSPORT_ADDRESS_BYTES
   * with its zero byte. It is published to all ranks. Valid until close. Null: an error. */
  const char* (*address)(distro_transport_channel* channel);

  /* A file descriptor (of epoll, for instance) that is readable whenever `receive` has something to
   * tell. The transport keeps it, and it stays the same until close. Timers belong into it too. */
  int32_t (*poll_fd)(distro_transport_channel* channel);

  /* Begin to connect to all peers: addresses[r] is the address of rank r; the own one is to be
   * ignored. Called once. Returns at once. A peer that cannot be reached now is tried again. */
  int32_t (*connect)(distro_transport_channel* channel, const char* const* addresses,
                     distro_transport_error* error);

  /* Take a frame for a peer: OK: all of it is taken (and copied, if it does not go at once); AGAIN:
   * nothing of it is, and SPACE will be told; GONE: nothing of it is, there is no connection. */
  int32_t (*send)(distro_transport_channel* channel, int32_t peer, const void* data, size_t size,
                  distro_transport_error* error);

  /* The next event, or AGAIN. */
  int32_t (*receive)(distro_transport_channel* channel, distro_transport_event* event,
                     distro_transport_error* error);

  /* Deliver the frames that were taken, for at most linger_ms milliseconds, and free the channel.
   * Called once for each channel that was opened, also after an error. */
  void (*close)(distro_transport_channel* channel, int64_t linger_ms);

  /* Null, or fill in the counters. Without it torch-distro counts the bytes of the frames. */
  void (*counters)(distro_transport_channel* channel, distro_transport_counters* counters);
} distro_transport;

/* The one function that a library exports. `host_abi` is torch-distro's DISTRO_TRANSPORT_ABI, for a
 * library that knows several; null if the library does not serve that version. */
DISTRO_TRANSPORT_EXPORT const distro_transport* distro_transport_plugin(uint32_t host_abi);

typedef const distro_transport* (*distro_transport_entry)(uint32_t host_abi);

#ifdef __cplusplus
}
#endif

#endif /* DISTRO_TRANSPORT_ABI_H */
