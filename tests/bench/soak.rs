//! Lives and processes, as many as wear out whatever leaves a little each time: fails when anything is
//! left on the host, or a process of the pod has grown. Long, and so only run when it is asked for.

use anyhow::Result;
use bulkhead_tests::soak;
use serde_json::{Map, Value, json};

use crate::table;

/// Lives of a container, from create to delete.
const LIVES: usize = 200;
/// Processes in one container, before it is looked at first and until the end.
const PROCESSES: [usize; 2] = [100, 900];

/// Soaks, prints the tables, gives what they have.
pub(crate) fn measure(_: usize) -> Result<Value> {
    let [before, after] = soak::lives(LIVES)?;
    let counts = || before.counts().into_iter().zip(after.counts());
    let rows: Vec<Vec<String>> = counts()
        .map(|((name, before), (_, after))| {
            vec![name.into(), before.to_string(), after.to_string()]
        })
        .collect();
    table::print(
        &format!("{LIVES} lives of a container"),
        &["on the host", "before", "after"],
        &rows,
    );
    let lives: Map<String, Value> = counts()
        .map(|((name, before), (_, after))| (name.into(), json!([before, after])))
        .collect();

    let [first, more] = PROCESSES;
    let pairs = soak::processes(first, more)?;
    let rows: Vec<Vec<String>> = pairs
        .iter()
        .map(|(name, [early, late])| {
            vec![
                (*name).into(),
                early.descriptors.to_string(),
                late.descriptors.to_string(),
                format!("{:.0}", early.kib),
                format!("{:.0}", late.kib),
            ]
        })
        .collect();
    let heading = ["", "descriptors", "at the end", "PSS KiB", "at the end"];
    table::print(&format!("After {first} and {} processes", first + more), &heading, &rows);
    let processes: Map<String, Value> = pairs
        .iter()
        .map(|(name, [early, late])| {
            let of = |held: &soak::Held| json!({"descriptors": held.descriptors, "kib": held.kib});
            ((*name).into(), json!([of(early), of(late)]))
        })
        .collect();
    Ok(json!({"lives": lives, "processes": processes}))
}
