//! `bulkhead list`: all containers of a root, as runc's table, as JSON, or their names.

use std::io::Write;

use super::args::{Global, List, ListFormat};
use crate::state::{Home, View};

/// The least width of a column.
const COLUMN_MIN: usize = 12;
/// The space between columns.
const PADDING: usize = 3;

pub(super) fn list(global: &Global, list: &List) -> anyhow::Result<()> {
    let mut views = Vec::new();
    for home in Home::all(&global.root)? {
        match home.read() {
            Ok(state) => views.push(home.view(state)),
            // Deleted meanwhile, or damaged: the others are listed all the same.
            Err(error) => tracing::warn!(error = %error, "cannot list a container"),
        }
    }
    let text = match (list.quiet, list.format) {
        (true, _) => views.iter().map(|view| format!("{}\n", view.id)).collect(),
        (false, ListFormat::Table) => table(&views),
        // An empty list is null in runc.
        (false, ListFormat::Json) if views.is_empty() => "null".to_owned(),
        (false, ListFormat::Json) => serde_json::to_string(&views)?,
    };
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

fn table(views: &[View]) -> String {
    let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
    rows.extend(views.iter().map(|view| {
        [
            view.id.to_string(),
            view.pid.to_string(),
            view.status.to_string(),
            view.bundle.display().to_string(),
            view.created.clone(),
            view.owner.clone(),
        ]
    }));
    let width = |column: usize| {
        let longest = rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        (longest + PADDING).max(COLUMN_MIN)
    };
    let widths: Vec<_> = (0..5).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(&widths) {
            text.push_str(&format!("{cell:width$}"));
        }
        text.push_str(&row[5]);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::lifecycle::Status;
    use std::collections::BTreeMap;

    #[test]
    fn an_empty_table_is_the_line_that_runc_prints() {
        let line = "ID          PID         STATUS      BUNDLE      CREATED     OWNER\n";
        assert_eq!(table(&[]), line);
    }

    #[test]
    fn columns_grow_with_their_content() {
        let view = View {
            oci_version: "1.0.2",
            id: "a-name-that-is-long".parse().unwrap(),
            pid: 7,
            status: Status::Running,
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: "T".into(),
            annotations: BTreeMap::new(),
            owner: "root".into(),
        };
        let text = table(&[view]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0].find("PID"), Some(22));
        assert_eq!(lines[1].find('7'), Some(22));
        assert!(lines[1].ends_with("T           root"), "{text}");
    }
}
