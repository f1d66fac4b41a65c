//! Requests of this host to servers over TCP and UDP, repeated until they answer.

use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::runtime::{comes_true, output, told};

/// A timeout for hangs; generous because of emulation.
const PATIENCE: Duration = Duration::from_secs(90);

/// The answer of the web server at `place`, an address and a port.
///
/// # Errors
/// When it does not answer in time.
pub fn says(place: &str) -> Result<String> {
    let url = format!("http://{place}/");
    let mut said = String::new();
    let asked = comes_true(PATIENCE, || {
        let asked = output(Command::new("busybox").args(["wget", "-q", "-O", "-", &url]));
        said = asked.map(|output| told(&output).1).unwrap_or_default();
        !said.is_empty()
    });
    ensure!(asked, "{place} says nothing");
    Ok(said.trim().to_owned())
}

/// Sends datagrams to `whom`, from the address `from`, until one comes back.
///
/// # Errors
/// When none comes back in time.
pub fn echoed_by_udp(from: &str, whom: &str) -> Result<()> {
    let socket = UdpSocket::bind((from, 0))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let mut answer = [0; 16];
    let echoed = comes_true(PATIENCE, || {
        // A datagram that is refused or lost is sent again.
        let sent = socket.send_to(b"datagram", whom).is_ok();
        sent && socket.recv(&mut answer).is_ok_and(|count| &answer[..count] == b"datagram")
    });
    ensure!(echoed, "{whom} sends nothing back");
    Ok(())
}
