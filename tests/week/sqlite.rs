//! SQLite in WAL mode: its index of the log is a mapping that all users of a database share.

use std::process::Child;

use crate::room::{Container, Debian, Room, same};

/// Adds rows, and counts all in a transaction of its own: a connection for each turn, as a script
/// has it, or one for all.
const WRITER: &str = r#"
import sqlite3, sys
name = sys.argv[1]
base = None
for turn in range(40):
    if base is None or turn % 10 == 0:
        base = sqlite3.connect("/v/base", timeout=120, isolation_level=None)
        base.execute("pragma synchronous=normal")
    base.execute("begin immediate")
    (total,) = base.execute("select total from sums").fetchone()
    base.execute("insert into rows values (?, ?)", (name, turn))
    base.execute("update sums set total = ?", (total + 1,))
    base.execute("commit")
    (total, rows) = base.execute("select total, (select count(*) from rows) from sums").fetchone()
    assert total == rows, (total, rows)
print(name, "wrote 40")
"#;
/// Makes the database.
const MAKE: &str = "sqlite3 /v/base 'pragma journal_mode=wal' 'create table rows (who, turn)' \
                    'create table sums (total)' 'insert into sums values (0)'";
const LOOK: &str = "sqlite3 /v/base 'pragma integrity_check' 'select total, (select count(*) from rows), \
                    (select count(distinct who) from rows) from sums'";

fn writer(container: &Container<'_>, name: &str) -> Child {
    container.spawn(&format!("python3 -c '{WRITER}' {name}"))
}

fn said(child: Child) -> String {
    let ended = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{errors}");
    String::from_utf8(ended.stdout).unwrap()
}

/// Two processes of one container; then one that is killed in the middle of its work.
fn in_one(room: &Room) -> String {
    let container = room.waiting("one");
    container.start();
    let mut did = container.exec(MAKE) + "\n";
    let writers = ["a", "b"].map(|name| writer(&container, name));
    did += &writers.map(said).concat();
    did += &format!("{}\n", container.exec(LOOK));
    let endless = format!("while :; do python3 -c '{WRITER}' c; done");
    let child = container.spawn(&endless);
    container.until("[ $(sqlite3 /v/base 'select count(*) from rows') -gt 100 ]");
    container.end_by("KILL");
    child.wait_with_output().unwrap();
    container.start();
    let whole = container.exec("sqlite3 /v/base 'pragma integrity_check' 'select total = (select count(*) from rows) from sums'");
    did + "killed\n" + &whole
}

#[test]
fn sqlite_in_one_container() {
    let right = "wal\na wrote 40\nb wrote 40\nok\n80|80|2\nkilled\nok\n1";
    same("SQLite in WAL mode", Debian::Few, right, in_one);
}

/// Two containers, which are two machines here, with a database on their volume.
fn in_two(room: &Room) -> String {
    let [first, second] = ["first", "second"].map(|id| room.waiting(id));
    first.start();
    second.start();
    let mut did = first.exec(MAKE) + "\n";
    let writers = [(&first, "a"), (&second, "b")].map(|(container, name)| writer(container, name));
    did += &writers.map(said).concat();
    did += &format!("{}\n", first.exec(LOOK));
    did + &second.exec(LOOK)
}

#[test]
fn sqlite_in_two_containers() {
    let right = "wal\na wrote 40\nb wrote 40\nok\n80|80|2\nok\n80|80|2";
    same("SQLite in WAL mode from two containers", Debian::Few, right, in_two);
}
