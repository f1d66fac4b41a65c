//! What a creator tells the agent: one JSON object a line, in a file that both know.
//!
//! It is a file and not a pipe, because the container's init keeps the descriptor until it runs the
//! user's program, so that a reader of a pipe would not see its end. The file is written by up to
//! three processes; each line is one write in append mode.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The name of a report, in the directory of what is being made.
pub(crate) const FILE: &str = "report";
/// The most of a report that is read.
const REPORT_BYTES: u64 = 64 << 10;
/// The longest reason that is written.
const REASON_BYTES: usize = 2048;

/// One line of a report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Line {
    /// The container is created; its init process has this pid.
    Created(i32),
    /// The user's program does not exist.
    NotFound(String),
    /// The user's program cannot be executed.
    NotExecutable(String),
    /// The last steps before the user's program failed.
    Unprepared(String),
    /// The container could not be created.
    Failed(String),
    /// An error on the way, which explains the failure that follows.
    Detail(String),
}

/// The writing side. Clones share the file.
#[derive(Debug)]
pub(crate) struct Report(File);

impl Report {
    /// Opens the report at `path` for appending and makes it if it is not there.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(OpenOptions::new().append(true).create(true).open(path)?))
    }

    /// Appends a line. What cannot be written is lost: the agent then sees a creator without a
    /// result, which is an error by itself.
    pub(crate) fn write(&self, mut line: Line) {
        let (Line::NotFound(reason)
        | Line::NotExecutable(reason)
        | Line::Unprepared(reason)
        | Line::Failed(reason)
        | Line::Detail(reason)) = &mut line
        else {
            return self.append(&line);
        };
        reason.truncate(reason.floor_char_boundary(REASON_BYTES));
        self.append(&line);
    }

    fn append(&self, line: &Line) {
        if let Ok(mut text) = serde_json::to_vec(line) {
            text.push(b'\n');
            let _ = (&self.0).write_all(&text);
        }
    }
}

/// Reads the lines of the report at `path`; lines that are not valid are left out.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn read(path: &Path) -> io::Result<Vec<Line>> {
    let mut text = String::new();
    File::open(path)?.take(REPORT_BYTES).read_to_string(&mut text)?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report");
        let report = Report::open(&path).unwrap();
        let lines = [Line::Detail("why".to_owned()), Line::Created(12)];
        lines.iter().for_each(|line| report.write(line.clone()));
        assert_eq!(read(&path).unwrap(), lines);
    }

    #[test]
    fn a_long_reason_is_cut() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report");
        Report::open(&path).unwrap().write(Line::Failed("ä".repeat(REASON_BYTES)));
        let lines = read(&path).unwrap();
        assert_eq!(lines, [Line::Failed("ä".repeat(REASON_BYTES / 2))]);
    }
}
