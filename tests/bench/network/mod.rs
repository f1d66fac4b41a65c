//! The network of a container: throughput, small packets, round trips and processor time, compared
//! with a runc container and QEMU's microvm on the same bridge, and measured from a further
//! namespace on it. Each contender is in a namespace with an interface of the bridge, to which the
//! taps of all machines are connected in the same way. Contenders with vhost-net are compared with
//! each other, and so are those without.
//!
//! iperf3 measures throughput. Between a quarter and three quarters of the transfer, the bytes
//! through the bridge and the busy time of the host are measured. So the time includes all work of
//! the host for the transfer, kernel threads too, but not its set-up and end. [`ends`] measures
//! datagrams and round trips.

use std::fs;
use std::net::Ipv4Addr;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::runtime::{Runtime, finish, output};
use serde_json::{Map, Value};
use tempfile::TempDir;

use crate::table::{self, median};

mod ends;
mod pods;

pub(crate) use ends::{far, near, wait};
use pods::{Bridge, Container, FAR_PORT, Microvm};

/// Bytes that iperf3 sends in each direction.
const TRANSFER: u64 = 96 << 20;
/// The most rounds, even if the other parts have more.
const ROUNDS_MAX: usize = 5;
const GIB: f64 = (1_u64 << 30) as f64;

/// The contenders, each with the index of the one that it is compared with.
const CONTENDERS: [(&str, Option<usize>); 5] = [
    ("bulkhead", None),
    ("runc", Some(0)),
    ("QEMU, vhost", Some(0)),
    ("bulkhead, monitor", None),
    ("QEMU", Some(3)),
];

/// The figures of one contender, in the order of [`FIGURES`].
type Figures = [Vec<f64>; FIGURES.len()];

/// The names of the figures, and whether a higher value is better.
const FIGURES: [(&str, bool); 8] = [
    ("TCP to it, Mbit/s", true),
    ("TCP from it, Mbit/s", true),
    ("busy to it, s/GiB", false),
    ("busy from it, s/GiB", false),
    ("64-byte UDP to it, /s", true),
    ("64-byte UDP from it, /s", true),
    ("turn p50, us", false),
    ("turn p99, us", false),
];

/// Starts all contenders, measures them in turn, prints the table, returns the medians.
pub(crate) fn measure(rounds: usize) -> Result<Value> {
    let work = TempDir::new()?;
    let _bridge = Bridge::new()?;
    let addresses = [2, 3, 4, 5, 6].map(|last| Ipv4Addr::new(10, 77, 0, last));
    let [ours, runc, vhost, monitor, qemu] = addresses;
    let _ours = Container::start(Runtime::new()?, "ours", ours)?;
    let _runc = Container::start(Runtime::runc()?, "runc", runc)?;
    let _vhost = Microvm::start(work.path(), "vhost", "vhost=on", vhost)?;
    let without = Runtime::new()?.with("BULKHEAD_VHOST_NET", "0");
    let _monitor = Container::start(without, "monitor", monitor)?;
    let _qemu = Microvm::start(work.path(), "qemu", "vhost=off", qemu)?;
    let each = || CONTENDERS.iter().map(|(name, _)| *name).zip(addresses);
    for (name, address) in each() {
        own("wait", address).context(name)?;
    }
    let mut all: [Figures; CONTENDERS.len()] = Default::default();
    for _ in 0..rounds.min(ROUNDS_MAX) {
        for ((name, address), figures) in each().zip(&mut all) {
            let round = round(address).context(name)?;
            figures.iter_mut().zip(round).for_each(|(figures, figure)| figures.push(figure));
        }
    }
    Ok(table(&all))
}

/// Prints and returns the medians, and prints how ours compare with the others (above 1 is better).
fn table(all: &[Figures]) -> Value {
    let mut heading = vec![""];
    heading.extend(CONTENDERS.map(|(name, _)| name));
    let mut rows = Vec::new();
    let mut results = Map::new();
    for (index, (figure, more)) in FIGURES.into_iter().enumerate() {
        let medians: Vec<f64> = all.iter().map(|figures| median(&figures[index])).collect();
        let cells = medians.iter().zip(CONTENDERS).map(|(theirs, (_, with))| {
            let digits = usize::from(*theirs < 100.0);
            let Some(own) = with.map(|with| medians[with]) else {
                return format!("{theirs:.digits$}");
            };
            let better = if more { own / theirs } else { theirs / own };
            format!("{theirs:.digits$} ({better:.2})")
        });
        rows.push(std::iter::once(figure.into()).chain(cells).collect());
        let named = CONTENDERS.map(|(name, _)| name.to_owned()).into_iter();
        let named = named.zip(medians.iter().copied().map(Value::from));
        results.insert(figure.into(), named.collect::<Map<_, _>>().into());
    }
    let title = "Network, medians; in brackets how much better the column of bulkhead before it is";
    table::print(title, &heading, &rows);
    Value::Object(results)
}

/// Measures all figures of one contender once.
fn round(address: Ipv4Addr) -> Result<[f64; FIGURES.len()]> {
    let (to, busy_to) = iperf(address, &[])?;
    let (from, busy_from) = iperf(address, &["--reverse"])?;
    let ends = own("far", address)?;
    let ends: Value = serde_json::from_slice(&ends)?;
    let [to_pps, from_pps, p50, p99] = ["to", "from", "p50", "p99"].map(|key| ends[key].as_f64());
    let missing = "a figure is missing";
    Ok([
        to,
        from,
        busy_to,
        busy_from,
        to_pps.context(missing)?,
        from_pps.context(missing)?,
        p50.context(missing)?,
        p99.context(missing)?,
    ])
}

/// Runs this program in the measuring namespace; returns its output.
fn own(task: &str, address: Ipv4Addr) -> Result<Vec<u8>> {
    let program = std::env::current_exe()?;
    let mut command = pods::far(program.to_str().context("the program's path is not UTF-8")?);
    let output = output(command.args([task, &address.to_string()]))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{task}: {}: {errors}", output.status);
    Ok(output.stdout)
}

/// Runs one transfer; returns its rate in Mbit/s, and the seconds that the host is busy for each
/// GiB.
fn iperf(address: Ipv4Addr, options: &[&str]) -> Result<(f64, f64)> {
    let mut command = pods::far("iperf3");
    command.args(["--json", "--bytes", &TRANSFER.to_string(), "--client"]);
    command.arg(address.to_string()).args(options);
    let begun = transferred()?;
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let busy = busy(&mut child, begun);
    let output = finish(child)?;
    let told: Value = serde_json::from_slice(&output.stdout).context("iperf3's report")?;
    ensure!(output.status.success(), "iperf3: {}", told["error"]);
    let rate = told["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok((rate.context("iperf3 reports no rate")? / 1e6, busy?))
}

/// The seconds that the host is busy for each GiB, measured in the middle of a transfer.
fn busy(transfer: &mut Child, begun: u64) -> Result<f64> {
    let until = |transfer: &mut Child, bytes: u64| {
        while transferred()? < begun + bytes {
            ensure!(transfer.try_wait()?.is_none(), "the transfer ended early");
            thread::sleep(Duration::from_millis(10));
        }
        Ok((transferred()?, Instant::now(), idle()?))
    };
    let (bytes, started, idle) = until(transfer, TRANSFER / 4)?;
    let (bytes_then, then, idle_then) = until(transfer, TRANSFER / 4 * 3)?;
    let processors = thread::available_parallelism()?.get() as f64;
    let busy = (then - started).as_secs_f64() * processors - (idle_then - idle);
    Ok(busy / ((bytes_then - bytes) as f64 / GIB))
}

/// The bytes that have passed the bridge port of the measuring namespace, in both directions.
fn transferred() -> Result<u64> {
    let counters = ["rx_bytes", "tx_bytes"].map(|name| {
        let path = format!("/sys/class/net/{FAR_PORT}/statistics/{name}");
        anyhow::Ok(fs::read_to_string(&path).context(path)?.trim().parse::<u64>()?)
    });
    counters.into_iter().sum()
}

/// The seconds that the host's processors have been idle.
fn idle() -> Result<f64> {
    let uptime = fs::read_to_string("/proc/uptime").context("/proc/uptime")?;
    let idle = uptime.split_whitespace().nth(1).context("/proc/uptime has no idle time")?;
    idle.parse().context("/proc/uptime")
}
