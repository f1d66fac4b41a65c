//! The figures of docs/PERFORMANCE.md beside those of a benchmark that has just run.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use guest_image::progress::say;
use serde_json::Value;

use crate::cargo::root;

const PAGE: &str = "docs/PERFORMANCE.md";
/// How far a figure may be from what the page says, of what it says. Those of peers that wait for
/// timers of the host come this far from one run to the next.
const TOLERANCE: f64 = 0.2;

/// A row of the page: `| words | FILE:/pointer | figure unit |`, where the second cell is code.
#[derive(Debug, PartialEq)]
struct Figure<'a> {
    file: &'a str,
    pointer: &'a str,
    said: f64,
}

/// Compares the page's figures with those that are in `results`; a part that was not measured is
/// not compared.
///
/// # Errors
/// A figure is further from the page than [`TOLERANCE`], or the page has none.
pub(crate) fn compare(results: &Path) -> Result<()> {
    let page = fs::read_to_string(root().join(PAGE)).context(PAGE)?;
    let figures: Vec<Figure<'_>> = page.lines().filter_map(parse).collect();
    ensure!(!figures.is_empty(), "{PAGE} has no figures");
    let mut wrong = 0;
    for Figure { file, pointer, said } in figures {
        let Ok(text) = fs::read_to_string(results.join(file)) else { continue };
        let measured: Value = serde_json::from_str(&text).with_context(|| file.to_owned())?;
        let Some(measured) = measured.pointer(pointer).and_then(Value::as_f64) else { continue };
        if !is_near(said, measured) {
            say(&format!("{PAGE} says {said} of {pointer}, and {measured:.0} was measured"));
            wrong += 1;
        }
    }
    ensure!(wrong == 0, "{wrong} figures of {PAGE} are not true any more");
    Ok(())
}

fn is_near(said: f64, measured: f64) -> bool {
    (measured - said).abs() <= said * TOLERANCE
}

fn parse(line: &str) -> Option<Figure<'_>> {
    let mut cells = line.strip_prefix('|')?.split('|').skip(1);
    let (file, pointer) =
        cells.next()?.trim().strip_prefix('`')?.strip_suffix('`')?.split_once(':')?;
    let figure = cells.next()?.split_whitespace().next()?.replace(',', "");
    Some(Figure { file, pointer, said: figure.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_names_where_its_figure_is() {
        let row = "| idle pod | `bench.json:/memory/pod` | 67,400 KiB |";
        let figure = Figure { file: "bench.json", pointer: "/memory/pod", said: 67400.0 };
        assert_eq!(parse(row), Some(figure));
        for other in ["", "| figure | where | |", "|---|---|---|", "| a | b | 1 ms |"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn every_figure_of_the_page_is_a_row() {
        let page = fs::read_to_string(root().join(PAGE)).unwrap();
        let rows = page.lines().filter(|line| line.contains(".json:"));
        assert!(rows.clone().count() > 5);
        for row in rows {
            assert!(parse(row).is_some(), "{row}");
        }
    }

    #[test]
    fn a_figure_may_be_a_fifth_off() {
        assert!(is_near(100.0, 119.0) && is_near(100.0, 81.0));
        assert!(!is_near(100.0, 121.0) && !is_near(100.0, 79.0));
    }
}
