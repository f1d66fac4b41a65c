//! Sends and echoes UDP datagrams in containers of the tests: `datagrams echo PORT` sends back
//! every datagram, `datagrams flood ADDRESS PORT` sends small ones as fast as it can.

use std::env;
use std::net::{Ipv6Addr, UdpSocket};

use anyhow::{Result, bail};

/// A payload for the smallest Ethernet frame.
const SMALL: [u8; 18] = [0; 18];

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["echo", port] => {
            // Answers IPv4 too.
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port.parse()?))?;
            let mut bytes = vec![0; 0x1_0000];
            loop {
                let (count, whom) = socket.recv_from(&mut bytes)?;
                socket.send_to(&bytes[..count], whom)?;
            }
        }
        ["flood", address, port] => {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect((address, port.parse()?))?;
            loop {
                // Fails if nobody listens or a buffer is full; the next datagram is sent anyway.
                let _ = socket.send(&SMALL);
            }
        }
        _ => bail!("echo PORT, or flood ADDRESS PORT"),
    }
}
