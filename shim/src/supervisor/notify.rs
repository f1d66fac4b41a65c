//! Readiness of a service: sd_notify(3). Datagrams that a container's processes send to systemd
//! leave the guest over a stream and go to a socket in the container's directory. The caller that
//! starts the container listens there ([`crate::cli`]) and, as with runc, notifies systemd.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use bulkhead_protocol::NOTIFY_BYTES_MAX;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::UnixStream;
use tokio::time::sleep;

use crate::state::Home;
use crate::state::socket_path::SocketPath;
use crate::supervisor::pod::{Pod, PodError};

/// The minimum time between two datagrams, so that a guest cannot flood the host.
const PAUSE: Duration = Duration::from_millis(1);

/// Opens the stream; returns its header for the agent.
///
/// # Errors
/// When the agent does not accept it.
pub(crate) async fn open(pod: &Pod, home: &Home) -> Result<Vec<u8>, PodError> {
    let (header, stream) = pod.open_stream().await?;
    let taken = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
    let stream = taken.map_err(|error| PodError::Io("stream of sd_notify", error))?;
    let home = home.clone();
    tokio::spawn(async move {
        if let Err(error) = pass_on(stream, &home).await {
            tracing::debug!(error = %error, "datagrams of sd_notify are not passed on any more");
        }
    });
    Ok(header.0.to_vec())
}

/// Forwards datagrams until the guest closes the stream, or nobody listens any more.
async fn pass_on(mut stream: impl AsyncRead + Unpin, home: &Home) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    let mut heard = false;
    while let Some(datagram) = receive(&mut stream).await? {
        // Fails once the container is removed: its directory is gone.
        let path = SocketPath::notify(home).map_err(io::Error::other)?;
        match socket.send_to(&datagram, path.path()) {
            Ok(_) => heard = true,
            // The listener is gone, or does not read any more.
            Err(_) if heard => return Ok(()),
            // Nobody listens yet: the container is not started.
            Err(_) => {}
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

/// Returns the next datagram, or `None` at the end of the stream.
async fn receive(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        length => usize::from(length?),
    };
    if length == 0 || length > NOTIFY_BYTES_MAX {
        return Err(io::Error::other(format!("a datagram of {length} bytes")));
    }
    let mut datagram = vec![0; length];
    stream.read_exact(&mut datagram).await?;
    Ok(Some(datagram))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::socket_path::NOTIFY_DIR;
    use std::path::Path;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn datagrams_reach_whoever_listens_until_he_has_gone() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::claim(root.path(), &"a".parse().unwrap(), Path::new("/b")).unwrap();
        std::fs::create_dir(home.dir().join(NOTIFY_DIR)).unwrap();
        let (mut guest, stream) = UnixStream::pair().unwrap();
        let passed = tokio::spawn({
            let home = home.clone();
            async move { pass_on(stream, &home).await }
        });
        // Nobody listens yet.
        guest.write_all(b"\0\x05EARLY").await.unwrap();
        sleep(Duration::from_millis(50)).await;
        let listener = UnixDatagram::bind(SocketPath::notify(&home).unwrap().path()).unwrap();
        guest.write_all(b"\0\x07READY=1").await.unwrap();
        let mut heard = [0; 64];
        let count = tokio::task::spawn_blocking(move || {
            let count = listener.recv(&mut heard).unwrap();
            heard[..count].to_vec()
        });
        assert_eq!(count.await.unwrap(), b"READY=1");
        guest.write_all(b"\0\x04LATE").await.unwrap();
        passed.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_sends_nonsense_is_not_listened_to() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::claim(root.path(), &"a".parse().unwrap(), Path::new("/b")).unwrap();
        for nonsense in [&[0xff, 0xff][..], &[0, 0]] {
            let (mut guest, stream) = UnixStream::pair().unwrap();
            guest.write_all(nonsense).await.unwrap();
            let error = pass_on(stream, &home).await.unwrap_err();
            assert!(error.to_string().starts_with("a datagram of "), "{error}");
        }
    }
}
