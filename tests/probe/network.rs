//! Tasks of a guest that has a network.

// UNSAFETY: interfaces are set up by ioctl, netdevice(7).
#![expect(unsafe_code, reason = "ioctls of a socket")]

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::ping::ping;

/// Carries out a task; the words of long tasks include a number of seconds.
pub(crate) fn carry_out(words: &[&str]) -> Result<String> {
    match words {
        ["up", name, address, mask] => up(name, address.parse()?, mask.parse()?),
        ["address", name, mac] => set_mac(name, mac),
        ["ping", address, size] => {
            let took = ping(address.parse()?, size.parse()?, Duration::from_secs(10))?;
            Ok(format!("{} us", took.as_micros()))
        }
        ["echo", port] => echo(port.parse()?),
        ["count", port, seconds] => count(port.parse()?, seconds.parse()?),
        ["flood", address, seconds] => flood(address.parse()?, seconds.parse()?),
        _ => bail!("no such task: {words:?}"),
    }
}

fn up(name: &str, address: Ipv4Addr, mask: Ipv4Addr) -> Result<String> {
    for (request, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, mask)] {
        change(name, request, |what| what.ifru_addr = socket_address(value))?;
    }
    let flags = (libc::IFF_UP | libc::IFF_RUNNING).try_into()?;
    change(name, libc::SIOCSIFFLAGS, |what| what.ifru_flags = flags)
}

fn set_mac(name: &str, mac: &str) -> Result<String> {
    let bytes = mac.split(':').map(|byte| u8::from_str_radix(byte, 16));
    let bytes = bytes.collect::<Result<Vec<_>, _>>()?;
    let mut sa_data = [0; 14];
    for (place, byte) in sa_data.iter_mut().zip(bytes) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    let address = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data };
    change(name, libc::SIOCSIFHWADDR, |what| what.ifru_hwaddr = address)
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut sa_data = [0; 14];
    for (place, byte) in sa_data[2..].iter_mut().zip(address.octets()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    // AF_INET is 2.
    libc::sockaddr { sa_family: 2, sa_data }
}

fn change(
    name: &str,
    request: libc::Ioctl,
    fill: impl FnOnce(&mut libc::__c_anonymous_ifr_ifru),
) -> Result<String> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: all zeroes is a valid request.
    let mut what: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in what.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    fill(&mut what.ifr_ifru);
    // SAFETY: the kernel reads one request.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut what) };
    ensure!(result == 0, "{name}: {}", io::Error::last_os_error());
    Ok("done".into())
}

/// Starts an echo server on a TCP port.
fn echo(port: u16) -> Result<String> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                io::copy(&mut &stream, &mut &stream)?;
                stream.shutdown(Shutdown::Write)
            });
        }
    });
    Ok("done".into())
}

/// Counts the datagrams that arrive.
fn count(port: u16, seconds: u64) -> Result<String> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut counted = 0;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(format!("{counted}"));
        }
        socket.set_read_timeout(Some(left))?;
        match socket.recv(&mut [0; 2048]) {
            Ok(_) => counted += 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("receive"),
        }
    }
}

/// Sends datagrams as fast as the guest can.
fn flood(address: SocketAddrV4, seconds: u64) -> Result<String> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut sent = 0;
    while Instant::now() < end {
        for _ in 0..100 {
            // The purpose is to fill the queue, so sends may fail.
            sent += u64::from(socket.send_to(&[0x5a; 1000], address).is_ok());
        }
    }
    Ok(format!("{sent}"))
}
