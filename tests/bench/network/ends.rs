//! The two ends of the measurements that iperf3 does not make: the rate of datagrams that arrive,
//! and the round-trip time of single bytes.
//!
//! The near end runs in each contender and does what the far end requests over TCP with one letter.
//! Both send and count datagrams with the same code.
//!
//! The receiver acknowledges its count now and then, and the sender is never far ahead of that.
//! Without this, most datagrams are lost where a kernel leaves no time for the process that should
//! read them, and the count would measure that loss and not the network's throughput.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

const PORT: u16 = 5300;
/// Where the far end's datagrams go.
const COUNTED_PORT: u16 = 5301;
/// How long a machine may take until its near end listens; a bound on hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// The requests to the near end.
const PING_PONG: u8 = b'p';
const COUNT: u8 = b'c';
const FLOOD: u8 = b'f';

/// The content of a datagram.
const DATAGRAM: [u8; 64] = [0x5a; 64];
/// How long datagrams are counted, beginning with the first.
const WINDOW: Duration = Duration::from_millis(1000);
/// How long datagrams are sent: longer than they are counted.
const FLOODED: Duration = Duration::from_millis(1400);
/// The receiver acknowledges its count after this number of datagrams.
const TOLD: u64 = 32;
/// How many datagrams may be in flight: a socket has room for them.
const AHEAD: u64 = 128;
/// Datagrams that are not acknowledged within this time count as lost.
const LOST: Duration = Duration::from_millis(50);
/// The number of measured round trips, and below that of the ones before them that are not
/// measured.
const TURNS: usize = 1000;
const WARM_UP: usize = 50;

/// Serves until it is killed.
pub(crate) fn near() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    for stream in listener.incoming().flatten() {
        // If a far end disconnects, the next one is served all the same.
        thread::spawn(move || answer(stream));
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut asked = [0];
    stream.read_exact(&mut asked)?;
    match asked[0] {
        PING_PONG => loop {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            stream.write_all(&byte)?;
        },
        COUNT => {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, COUNTED_PORT))?;
            stream.write_all(&asked)?;
            Ok(stream.write_all(&count(&socket)?.to_le_bytes())?)
        }
        FLOOD => {
            let mut port = [0; 2];
            stream.read_exact(&mut port)?;
            flood((stream.peer_addr()?.ip(), u16::from_le_bytes(port)).into())
        }
        other => bail!("asked for {other}"),
    }
}

/// Measures against the near end at an address.
pub(crate) fn far(address: Ipv4Addr) -> Result<Value> {
    let [p50, p99] = ping_pong(ask(address, PING_PONG)?)?;
    let mut stream = ask(address, COUNT)?;
    stream.read_exact(&mut [0]).context("the near end does not count")?;
    flood(SocketAddrV4::new(address, COUNTED_PORT).into())?;
    let mut to = [0; 8];
    stream.read_exact(&mut to).context("the near end has no count")?;

    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let mut stream = ask(address, FLOOD)?;
    stream.write_all(&socket.local_addr()?.port().to_le_bytes())?;
    let from = count(&socket)?;
    // Wait until the flood is over.
    stream.read_to_end(&mut Vec::new())?;
    Ok(json!({"p50": p50, "p99": p99, "to": f64::from_le_bytes(to), "from": from}))
}

/// Waits until the near end answers.
pub(crate) fn wait(address: Ipv4Addr) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = ask(address, PING_PONG) {
        ensure!(Instant::now() < deadline, "nothing answers at {address}: {error:#}");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn ask(address: Ipv4Addr, what: u8) -> Result<TcpStream> {
    let address = SocketAddrV4::new(address, PORT).into();
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[what])?;
    Ok(stream)
}

/// The median and the 99th percentile of the round-trip times, in microseconds.
fn ping_pong(mut stream: TcpStream) -> Result<[f64; 2]> {
    let mut turns = Vec::with_capacity(TURNS);
    for turn in 0..WARM_UP + TURNS {
        let begun = Instant::now();
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        if turn >= WARM_UP {
            turns.push(begun.elapsed().as_secs_f64() * 1e6);
        }
    }
    turns.sort_by(f64::total_cmp);
    Ok([turns[TURNS / 2], turns[TURNS - TURNS / 100]])
}

/// Counts the datagrams that arrive in a second.
fn count(socket: &UdpSocket) -> Result<f64> {
    let mut bytes = [0; 2 * DATAGRAM.len()];
    socket.set_read_timeout(Some(PATIENCE))?;
    let (_, sender) = socket.recv_from(&mut bytes).context("no datagram came")?;
    // If the flood ends early, the rate is computed from the real duration.
    socket.set_read_timeout(Some(WINDOW))?;
    let begun = Instant::now();
    let mut counted = 1_u64;
    while begun.elapsed() < WINDOW && socket.recv(&mut bytes).is_ok() {
        counted += 1;
        if counted.is_multiple_of(TOLD) {
            // An acknowledgement may be lost: the next one has a higher count.
            let _ = socket.send_to(&counted.to_le_bytes(), sender);
        }
    }
    Ok(counted as f64 / begun.elapsed().as_secs_f64())
}

/// Sends datagrams as fast as they are acknowledged.
fn flood(to: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(LOST))?;
    let begun = Instant::now();
    let (mut sent, mut lost, mut counted) = (0_u64, 0_u64, 0_u64);
    while begun.elapsed() < FLOODED {
        while sent - lost - counted < AHEAD {
            // Fails when the receiver has stopped listening.
            let _ = socket.send_to(&DATAGRAM, to);
            sent += 1;
        }
        let mut told = [0; 8];
        match socket.recv(&mut told) {
            Ok(_) => counted = u64::from_le_bytes(told).clamp(counted, sent - lost),
            Err(_) => lost = sent - counted,
        }
    }
    Ok(())
}
