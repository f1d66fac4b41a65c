//! Compares the shared file system with the same work on the host, in the same directory and with
//! the same busybox.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::runtime::{Runtime, each_line};
use serde_json::{Map, Value, json};

use crate::table::{self, median};

const FILES: u32 = 2000;
/// The measured work: a name, how much of its unit is done, and a script that has the directory in
/// `$D`.
const WORK: [(&str, u32, &str); 5] = [
    (
        "sequential write, MiB/s",
        64,
        "dd if=/dev/zero of=$D/big bs=1M count=64 conv=fsync 2>/dev/null",
    ),
    ("sequential read, MiB/s", 64, "dd if=$D/big of=/dev/null bs=1M 2>/dev/null"),
    ("metadata walk, files/s", FILES, "find $D/tree -type f -exec stat -c %s {} + > /dev/null"),
    ("small files read, files/s", FILES, "find $D/tree -type f -exec cat {} + > /dev/null"),
    (
        "small files made, files/s",
        500,
        "rm -rf $D/new; mkdir $D/new; i=0; while [ $i -lt 500 ]; do echo x > $D/new/$i; i=$((i+1)); done",
    ),
];

/// The seconds that each piece of [`WORK`] took, round by round.
type Times = [Vec<f64>; WORK.len()];

/// Does the work on both sides, prints the table, returns the medians.
pub(crate) fn measure(rounds: usize) -> Result<Value> {
    let directory = tempfile::tempdir()?;
    make_tree(directory.path())?;
    let (mut host, mut guest): (Times, Times) = Default::default();
    for _ in 0..rounds.min(5) {
        let mut on_host = Command::new("/bin/busybox");
        on_host.args(["sh", "-c", &script(directory.path())]);
        collect(on_host.stdout(Stdio::piped()).spawn()?, &mut host)?;

        let runtime = Runtime::new()?;
        let bundle = Bundle::script(&script(Path::new("/mnt")))?;
        let bundle = bundle.mount(bind(directory.path(), "/mnt", &["rw"]))?;
        collect(runtime.spawn_run("files", &bundle)?, &mut guest)?;
    }
    let mut rows = Vec::new();
    let mut results = Map::new();
    for ((name, amount, _), (host, guest)) in WORK.iter().zip(host.iter().zip(&guest)) {
        let rate = |seconds: &[f64]| f64::from(*amount) / median(seconds);
        let (host, guest) = (rate(host), rate(guest));
        let share = guest / host;
        rows.push(vec![
            (*name).into(),
            format!("{host:.0}"),
            format!("{guest:.0}"),
            format!("{share:.2}"),
        ]);
        results.insert((*name).into(), json!({"host": host, "container": guest}));
    }
    table::print("Shared files", &["", "host", "container", "container / host"], &rows);
    Ok(Value::Object(results))
}

/// A script that prints a line before and after each piece of work; the reader of the lines takes
/// the times.
fn script(directory: &Path) -> String {
    let mut script = format!("D={}; ", directory.display());
    for (.., work) in WORK {
        script.push_str(&format!("echo begin; {work}; echo end; "));
    }
    script
}

fn collect(child: Child, times: &mut Times) -> Result<()> {
    let mut pieces = times.iter_mut();
    let mut begun = Instant::now();
    each_line(child, |line| {
        match line {
            "begin" => begun = Instant::now(),
            "end" => pieces.next().context("too many lines")?.push(begun.elapsed().as_secs_f64()),
            other => anyhow::bail!("unexpected output {other}"),
        }
        Ok(())
    })?;
    ensure!(pieces.next().is_none(), "some of the work was not done");
    Ok(())
}

fn make_tree(directory: &Path) -> Result<()> {
    for index in 0..FILES {
        let parent = directory.join(format!("tree/{}/{}", index % 10, index % 100));
        fs::create_dir_all(&parent)?;
        fs::write(parent.join(index.to_string()), b"x")?;
    }
    Ok(())
}
