//! Medians, and tables for a person to read.

/// The median; of an even number of values, the lower one of the middle two.
#[must_use]
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// Prints a title, a heading and rows, columns aligned.
#[expect(clippy::print_stdout, reason = "the table is the product")]
pub(crate) fn print(title: &str, heading: &[&str], rows: &[Vec<String>]) {
    let heading: Vec<String> = heading.iter().map(|cell| (*cell).to_owned()).collect();
    let lines: Vec<&Vec<String>> = std::iter::once(&heading).chain(rows).collect();
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(String::len).max().unwrap_or(0)
    };
    println!("\n{title}");
    for line in &lines {
        let cells: Vec<String> = line
            .iter()
            .enumerate()
            .map(|(column, cell)| match column {
                0 => format!("{cell:<width$}", width = width(column)),
                _ => format!("{cell:>width$}", width = width(column)),
            })
            .collect();
        println!("  {}", cells.join("  "));
    }
}
