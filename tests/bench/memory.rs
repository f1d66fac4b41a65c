//! Memory of an idle pod: proportional set sizes, as the host's kernel counts them.

use anyhow::{Context, Result, ensure};
use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::memory::pss_kib;
use bulkhead_tests::runtime::Runtime;
use serde_json::{Value, json};

use crate::table::{self, median};

/// The processes of a pod, by a part of their command line.
const PROCESSES: [(&str, &str); 4] = [
    ("monitor", "bulkhead-vmm"),
    ("file server", "bulkhead-fs"),
    ("supervisor", " supervise"),
    ("stand-in", "bulkhead-stand-in"),
];

/// Starts an idle pod for each round, prints the table, returns the medians in KiB.
pub(crate) fn measure(rounds: usize) -> Result<Value> {
    let runtime = Runtime::new()?;
    let bundle = Bundle::new(&["/bin/sleep", "1000"])?;
    let mut own: [Vec<f64>; PROCESSES.len()] = Default::default();
    let mut guest = Vec::new();
    for _ in 0..rounds.min(3) {
        runtime.create("idle", &bundle)?;
        runtime.ok(&["start", "idle"])?;
        std::thread::sleep(std::time::Duration::from_secs(5));
        for (own, (name, part)) in own.iter_mut().zip(PROCESSES) {
            let pids = runtime.processes(part)?;
            ensure!(pids.len() == 1, "{name}: {} processes", pids.len());
            let pid = pids.first().context(name)?;
            let (process, memory) = pss_kib(*pid)?;
            own.push(process);
            if name == "monitor" {
                guest.push(memory);
            }
        }
        runtime.ok(&["delete", "--force", "idle"])?;
    }
    let medians: Vec<f64> = own.iter().map(|values| median(values)).collect();
    let guest = median(&guest);
    let jailed = medians.iter().take(2).sum::<f64>();
    let total = medians.iter().sum::<f64>() + guest;
    let mut rows: Vec<Vec<String>> = PROCESSES
        .iter()
        .zip(&medians)
        .map(|((name, _), kib)| vec![(*name).into(), format!("{kib:.0}")])
        .collect();
    rows.push(vec!["monitor + file server".into(), format!("{jailed:.0}")]);
    rows.push(vec!["guest memory in use".into(), format!("{guest:.0}")]);
    rows.push(vec!["whole idle pod".into(), format!("{total:.0}")]);
    table::print("Memory of an idle pod", &["", "PSS KiB"], &rows);
    Ok(json!({
        "unit": "KiB",
        "monitor": medians.first(), "file_server": medians.get(1), "supervisor": medians.get(2),
        "stand_in": medians.get(3), "monitor_and_file_server": jailed, "guest": guest,
        "pod": total,
    }))
}
