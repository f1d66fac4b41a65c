//! The contract between the supervisor on the host and the agent inside the guest.
//!
//! Calls are gRPC over one vsock connection to [`AGENT_PORT`]; see `agent.proto`. Streams of processes
//! do not cross as calls: each is a raw vsock stream to [`STREAM_PORT`] that opens with a
//! [`StreamHeader`]. The host always dials; the guest only listens.
//!
//! The agent trusts the host. The host does not trust the agent: every answer is bounded by
//! [`MAX_MESSAGE_BYTES`] and by a deadline that the caller sets.

use std::fmt;

/// The generated messages, client and server.
#[allow(missing_docs, clippy::all)]
pub mod agent {
    tonic::include_proto!("bulkhead.agent.v1");
}

/// The version of this contract; both sides must name the same.
pub const VERSION: u32 = 14;
/// The vsock port on which the agent serves its calls.
pub const AGENT_PORT: u32 = 1024;
/// The vsock port on which the agent accepts streams of processes.
pub const STREAM_PORT: u32 = 1025;
/// The largest message that the host accepts.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// The largest one that the guest accepts: a specification can have as many arguments, variables and
/// mounts as Linux takes.
pub const MAX_REQUEST_BYTES: usize = 16 << 20;
/// The most descriptors that a process gets beyond its standard streams. Together with these they
/// fit into one message between processes of the host, and into the streams that may wait for a
/// call in the guest.
pub const DESCRIPTORS_MAX: usize = 61;
/// Where the agent makes a directory with a socket for sd_notify(3), for each container that has one.
pub const NOTIFY_DIR: &str = "/run/bulkhead/notify";
/// The name of the socket in there.
pub const NOTIFY_SOCKET: &str = "notify.sock";
/// The most bytes of a datagram of sd_notify(3) that reach the host.
pub const NOTIFY_BYTES_MAX: usize = 4096;
/// Where the agent makes sockets that stand for those of the host, in a directory for each container.
pub const HOST_SOCKETS_DIR: &str = "/run/bulkhead/sockets";
/// Where the agent listens for connections to sockets in shared directories that nobody inside has
/// bound.
pub const SHARED_SOCKETS_DIR: &str = "/run/bulkhead/shared-sockets";
/// The most supplementary groups of a process that connects to one that the host is told of.
pub const HOST_SOCKET_GROUPS_MAX: usize = 256;
/// The most bytes of a `ConnectionWanted`.
pub const CONNECTION_WANTED_MAX: usize = 4096;
/// The most connections to sockets of the host that a pod has at once; further ones wait.
pub const CONNECTIONS_MAX: usize = 256;
/// The tag of the virtio-fs device that shares the pod's files.
pub const SHARE_TAG: &str = "bulkhead";
/// Where the agent mounts the shared files in the guest.
pub const SHARE_DIR: &str = "/run/bulkhead/share";
/// The name of the file in there that has the modules of the guest's kernel.
pub const MODULES_FILE: &str = "modules";
/// The name of the directory in there that has the interpreters of the host's binary formats.
pub const FORMATS_DIR: &str = "formats";

/// Names one stream of a process: the first 16 bytes on a connection to [`STREAM_PORT`].
///
/// The host draws a fresh random value for each stream and names it in the call that creates the
/// process; the two may arrive in either order. After the header the stream is the process's raw
/// bytes, and shutting down one direction is end of file.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamHeader(pub [u8; Self::LEN]);

impl StreamHeader {
    /// The header's length on the wire.
    pub const LEN: usize = 16;

    /// Reads the header out of a message's bytes field; `None` if its length is not [`Self::LEN`].
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Debug for StreamHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The value is what authorises the connection, so it is not printed.
        f.write_str("StreamHeader(..)")
    }
}
