//! Messages in a stream of bytes: each after its length in four bytes, the highest one first.

use std::io;

use tokio::net::UnixStream;

/// The most bytes of a frame that carries a packet or a datagram: more than Linux takes in one by
/// default (`net.core.wmem_default`).
pub const FRAME_MAX: usize = 256 << 10;

/// Writes one frame.
///
/// # Errors
/// The stream is closed, or the frame is too long.
pub async fn write_frame(stream: &UnixStream, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(body.len() + 4);
    frame.extend(length.to_be_bytes());
    frame.extend(body);
    write_all(stream, &frame).await
}

/// Reads the next frame, of at most `most` bytes; `None` at the end of the stream.
///
/// # Errors
/// The stream fails or ends within a frame, or the frame is empty or too long.
pub async fn read_frame(stream: &UnixStream, most: usize) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match fill(stream, &mut length).await? {
        0 => return Ok(None),
        4 => {}
        _ => return Err(io::ErrorKind::UnexpectedEof.into()),
    }
    let length = usize::try_from(u32::from_be_bytes(length)).map_err(io::Error::other)?;
    if length == 0 || length > most {
        return Err(too_long(length));
    }
    let mut body = vec![0; length];
    if fill(stream, &mut body).await? < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(body))
}

/// Writes all bytes.
///
/// # Errors
/// The stream is closed.
pub async fn write_all(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads until the buffer is full or the stream ends; returns how many bytes were read.
async fn fill(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(room) = buffer.get_mut(filled..).filter(|room| !room.is_empty()) {
        stream.readable().await?;
        match stream.try_read(room) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

pub(crate) fn too_long(length: usize) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a message of {length} bytes"))
}
