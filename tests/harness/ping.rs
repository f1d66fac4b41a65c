//! ICMP echo requests. The guest's side of a test compiles this file too.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, recv, sendto, socket};

/// How long to wait for one reply before the next request is sent: the first may be lost.
const INTERVAL: Duration = Duration::from_secs(1);

/// Sends an echo request with `size` bytes; returns how long the reply took.
///
/// # Errors
/// When no reply comes in time.
pub fn ping(address: Ipv4Addr, size: usize, patience: Duration) -> Result<Duration> {
    let socket = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP))?;
    let payload: Vec<u8> = (0_u8..251).cycle().take(size).collect();
    let asked = echo_request(std::process::id(), &payload);
    let start = Instant::now();
    while start.elapsed() < patience {
        sendto(&socket, &asked, SendFlags::empty(), &SocketAddrV4::new(address, 0))?;
        let next = Instant::now() + INTERVAL;
        while let left = next.saturating_duration_since(Instant::now())
            && !left.is_zero()
        {
            set_socket_timeout(&socket, Timeout::Recv, Some(left))?;
            match receive(&socket) {
                // A reply differs from its request in type and checksum.
                Ok(answer) if answer.first() == Some(&0) && answer.get(4..) == asked.get(4..) => {
                    return Ok(start.elapsed());
                }
                Ok(_) | Err(Errno::AGAIN) => {}
                Err(error) => return Err(error).context("receive"),
            }
        }
    }
    bail!("{address} echoes nothing")
}

/// An ICMP message without its IP header.
fn receive(socket: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; 0x1_0000];
    let (_, count) = recv(socket, &mut bytes[..], RecvFlags::empty())?;
    let header = usize::from(bytes[0] & 15) * 4;
    Ok(bytes.get(header..count).unwrap_or_default().to_vec())
}

/// RFC 792, with the checksum of RFC 1071.
fn echo_request(id: u32, payload: &[u8]) -> Vec<u8> {
    let [.., id_high, id_low] = id.to_be_bytes();
    let mut message = vec![8, 0, 0, 0, id_high, id_low, 0, 1];
    message.extend(payload);
    let words = message.chunks(2).map(|word| {
        let low = word.get(1).copied().unwrap_or_default();
        u32::from(u16::from_be_bytes([word[0], low]))
    });
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let [.., high, low] = (!sum).to_be_bytes();
    message[2..4].copy_from_slice(&[high, low]);
    message
}
