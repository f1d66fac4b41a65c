//! Each command of a container's life, and `exec true` in it, compared with runc.

use std::time::Instant;

use anyhow::Result;
use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::Runtime;
use serde_json::{Map, Value, json};

use crate::table::{self, median};

/// The measured commands, in their order. A container's first `exec` is measured separately,
/// because the page cache of a new machine is still cold.
const VERBS: [&str; 5] = ["create", "start", "first exec true", "exec true", "delete"];
/// How many processes are run after the first; their median is used.
const EXECS: usize = 5;

/// Runs a container's life under both runtimes, prints the table, returns the medians in
/// milliseconds.
pub(crate) fn measure(rounds: usize) -> Result<Value> {
    let bundle = Bundle::new(&["/bin/sleep", "1000"])?;
    let (ours, runc) = (Runtime::new()?, Runtime::runc()?);
    let mut times: [[Vec<f64>; 5]; 2] = Default::default();
    for _ in 0..rounds {
        for (runtime, times) in [&ours, &runc].into_iter().zip(&mut times) {
            for (time, verb) in live(runtime, &bundle)?.into_iter().zip(times) {
                verb.push(time);
            }
        }
    }
    let [ours, runc] = &times;
    let mut rows = Vec::new();
    let mut results = Map::new();
    for ((verb, ours), runc) in VERBS.into_iter().zip(ours).zip(runc) {
        let (ours, runc) = (median(ours), median(runc));
        let ratio = ours / runc;
        rows.push(vec![
            verb.into(),
            format!("{ours:.0}"),
            format!("{runc:.0}"),
            format!("{ratio:.2}"),
        ]);
        results.insert(verb.into(), json!({"bulkhead": ours, "runc": runc}));
    }
    table::print("Verbs, median ms", &["", "bulkhead", "runc", "bulkhead / runc"], &rows);
    Ok(json!({"unit": "ms", "verbs": results}))
}

/// Runs one container; returns the times in milliseconds.
fn live(runtime: &Runtime, bundle: &Bundle) -> Result<[f64; 5]> {
    let create = timed(|| runtime.create("bench", bundle))?;
    let start = timed(|| runtime.ok(&["start", "bench"]).map(drop))?;
    let exec = || timed(|| runtime.ok(&["exec", "bench", "/bin/true"]).map(drop));
    let first = exec()?;
    let again = (0..EXECS).map(|_| exec()).collect::<Result<Vec<_>>>()?;
    runtime.ok(&["kill", "bench", "KILL"])?;
    runtime.wait_for_status("bench", "stopped")?;
    let delete = timed(|| runtime.ok(&["delete", "bench"]).map(drop))?;
    Ok([create, start, first, median(&again), delete])
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}
