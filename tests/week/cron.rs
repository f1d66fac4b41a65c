//! Jobs that must not run at the same time, kept apart by flock(1) on a file of a volume.

use crate::room::{Debian, same};

/// Counts to 5, one step at a time.
const JOBS: &str = r#"
touch /v/$(hostname)
while ! [ -e /v/first ] || ! [ -e /v/second ]; do sleep 0.05; done
for turn in $(seq 5); do
    flock /v/lock sh -c 'n=$(cat /v/count); sleep 0.02; echo $((n + 1)) > /v/count'
done
"#;
/// Takes the lock for as long as it is there.
const HOLD: &str = "flock /v/lock sh -c 'touch /v/held; exec tail -f /dev/null'";

const RIGHT: &str = "two at a time: 5 each of 10
one at a time: 5 each of 10
busy: 1
given up after a second: 1
free, as the holder was killed: 0
free, as its container was killed: 0";

#[test]
fn jobs_with_a_lock() {
    same("jobs with flock", Debian::Few, RIGHT, |room| {
        let count = room.volume().join("count");
        let counted = || std::fs::read_to_string(&count).unwrap().trim().to_owned();
        let started = ["first", "second"];
        let forget = || {
            started.iter().for_each(|name| std::fs::remove_file(room.volume().join(name)).unwrap());
            std::fs::write(&count, "0\n").unwrap();
        };
        std::fs::write(&count, "0\n").unwrap();
        let [first, second] = started.map(|id| room.waiting(id));
        first.start();
        second.start();
        let work = |containers: [&crate::room::Container<'_>; 2]| {
            let children = containers.map(|container| container.spawn(JOBS));
            for child in children {
                let ended = child.wait_with_output().unwrap();
                assert!(ended.status.success(), "{ended:?}");
            }
        };
        // Both in one container, each under the name of one.
        let pair = JOBS.replace("$(hostname)", "$name");
        let pair = format!("for name in first second; do ({pair}) & done; wait");
        first.exec(&pair);
        let mut did = format!("two at a time: 5 each of {}\n", counted());
        forget();
        work([&first, &second]);
        did += &format!("one at a time: 5 each of {}\n", counted());

        let holder = first.spawn(HOLD);
        second.until("[ -e /v/held ]");
        let tried = |how: &str| second.exec(&format!("flock {how} /v/lock true || echo $?"));
        did += &format!("busy: {}\n", tried("-n"));
        did += &format!("given up after a second: {}\n", tried("-w 1"));
        let free = || second.exec("flock -w 60 /v/lock true; echo $?");
        first.exec("pkill -KILL -x tail");
        assert!(!holder.wait_with_output().unwrap().status.success());
        did += &format!("free, as the holder was killed: {}\n", free());

        std::fs::remove_file(room.volume().join("held")).unwrap();
        let holder = first.spawn(HOLD);
        second.until("[ -e /v/held ]");
        first.end_by("KILL");
        assert!(!holder.wait_with_output().unwrap().status.success());
        did + &format!("free, as its container was killed: {}\n", free())
    });
}
