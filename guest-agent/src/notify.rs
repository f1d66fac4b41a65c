//! Readiness of a service: sd_notify(3). A container's processes send datagrams to a socket that is
//! mounted into the container. A stream passes them to the host, each after its length in two
//! bytes, the higher one first.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use bulkhead_protocol::{NOTIFY_BYTES_MAX, NOTIFY_DIR, NOTIFY_SOCKET};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixDatagram;

use crate::socket_path::SocketPath;

/// Where a container has its socket; its id must have been checked.
pub(crate) fn directory(container_id: &str) -> PathBuf {
    Path::new(NOTIFY_DIR).join(container_id)
}

/// Makes the socket, to which every user of the container may send.
///
/// # Errors
/// The container has one already.
pub(crate) fn listen(container_id: &str) -> io::Result<UnixDatagram> {
    listen_in(&directory(container_id))
}

fn listen_in(directory: &Path) -> io::Result<UnixDatagram> {
    fs::create_dir_all(directory)?;
    let path = SocketPath::within(directory, NOTIFY_SOCKET)?;
    let socket = UnixDatagram::bind(path.as_path())?;
    fs::set_permissions(path.as_path(), Permissions::from_mode(0o777))?;
    Ok(socket)
}

/// Passes datagrams to the host until the host closes the stream, or an empty datagram comes.
pub(crate) async fn relay<S: AsyncRead + AsyncWrite>(socket: UnixDatagram, stream: S) {
    let (mut host, mut to_host) = tokio::io::split(stream);
    let mut closed = [0];
    let passed = async {
        let mut datagram = vec![0; NOTIFY_BYTES_MAX];
        loop {
            let count = socket.recv(&mut datagram).await?;
            let length = u16::try_from(count).map_err(io::Error::other)?;
            if length == 0 {
                return Ok(());
            }
            to_host.write_all(&length.to_be_bytes()).await?;
            to_host.write_all(datagram.get(..count).unwrap_or_default()).await?;
        }
    };
    let ended: io::Result<()> = tokio::select! {
        ended = passed => ended,
        _ = host.read(&mut closed) => Ok(()),
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "datagrams of sd_notify are not passed on any more");
    }
}

/// Ends the relay of a container that is removed, by an empty datagram.
pub(crate) fn end(container_id: &str) {
    let path = directory(container_id).join(NOTIFY_SOCKET);
    if let Ok(socket) = std::os::unix::net::UnixDatagram::unbound() {
        // Most containers have no such socket.
        let _ = socket.set_nonblocking(true).and_then(|()| socket.send_to(&[], path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram as Sender;

    #[tokio::test]
    async fn datagrams_come_one_by_one_and_an_empty_one_is_the_end() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("one");
        let socket = listen_in(&directory).unwrap();
        assert!(listen_in(&directory).is_err(), "there is one already");
        let (mut host, stream) = tokio::net::UnixStream::pair().unwrap();
        let relayed = tokio::spawn(relay(socket, stream));
        let sender = Sender::unbound().unwrap();
        for words in [&b"READY=1"[..], &[7; NOTIFY_BYTES_MAX + 5], b""] {
            sender.send_to(words, directory.join(NOTIFY_SOCKET)).unwrap();
        }
        let mut received = Vec::new();
        host.read_to_end(&mut received).await.unwrap();
        relayed.await.unwrap();
        let long = [&[16, 0][..], &[7; NOTIFY_BYTES_MAX]].concat();
        assert_eq!(received, [&[0, 7][..], b"READY=1", &long].concat());
    }

    #[tokio::test]
    async fn a_host_that_closes_the_stream_ends_it() {
        let root = tempfile::tempdir().unwrap();
        let socket = listen_in(root.path()).unwrap();
        let (host, stream) = tokio::net::UnixStream::pair().unwrap();
        let relayed = tokio::spawn(relay(socket, stream));
        drop(host);
        relayed.await.unwrap();
    }
}
