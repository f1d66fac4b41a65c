//! Runs enough containers and processes to show even small leaks. Fails when anything is left on
//! the host, or a process of the pod has grown. It takes long, so it runs only when it is named.

use anyhow::Result;
use bulkhead_tests::soak;
use serde_json::{Map, Value, json};

use crate::table;

/// How many containers are run, each from create to delete.
const LIVES: usize = 200;
/// Processes in one container: before the first look, and from there to the end.
const PROCESSES: [usize; 2] = [100, 900];

/// Runs both, prints the tables, returns their figures.
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
