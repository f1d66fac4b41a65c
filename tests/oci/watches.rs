//! What a program inside is told of changes by the host, `inotify(7)`: the same events in the same
//! order as under runc.

use std::process::Command;

use bulkhead_tests::bundle::{self, Bundle};
use bulkhead_tests::runtime::told;

use crate::volume::{Volume, ask, said};

/// Watches the volume, a file and a directory in it. Prints each event until a name `end` appears:
/// what is watched, the mask, the name, and which number the rename has.
const WATCHER: &str = r#"
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(0)
os.mkdir("/v/d")
paths = {libc.inotify_add_watch(watch, path.encode(), 0xfff): path
         for path in ["/v", "/v/d", "/v/file"]}
open("/v/ready", "w").close()
cookies, name = {0: ""}, ""
while name != "end":
    data = os.read(watch, 65536)
    while data:
        which, mask, cookie, length = struct.unpack("iIII", data[:16])
        name, data = data[16:16 + length].rstrip(b"\0").decode(), data[16 + length:]
        # The file by which the test learns that this program is ready.
        if name != "ready":
            number = cookies.setdefault(cookie, len(cookies))
            print(paths[which], f"{mask:x}", name, number)
        if name == "again" and not os.path.exists("/v/own"): os.mkdir("/v/own")
"#;

/// What the host does, each after a pause so that nothing is merged.
const CHANGES: [&str; 13] = [
    "echo x > new",
    "echo y >> file",
    "cat file > /dev/null",
    "mv new d/moved",
    "mv d/moved d/other",
    "chmod 600 file; touch -d 2001-01-01 d",
    "mkdir sub; rmdir sub",
    "ln -s nowhere link; ln file hard; rm hard link",
    "echo z > temporary; mv temporary file2; mv file2 file",
    "mkdir again",
    "rm d/other",
    "rmdir again",
    "mkdir end",
];

fn change(volume: &Volume, script: &str) {
    let mut shell = Command::new("sh");
    let status = shell.current_dir(&volume.path).args(["-c", script]).status().unwrap();
    assert!(status.success(), "{script}");
    std::thread::sleep(std::time::Duration::from_millis(300));
}

#[test]
fn changes_by_the_host_are_told_as_under_runc() {
    let [runc, ours] = ask(|volume| {
        let watcher = volume.python_until_ready(WATCHER);
        for script in CHANGES {
            change(volume, script);
        }
        said(watcher)
    });
    for expected in ["/v 100 new", "/v/file 2", "/v/file 400", "/v 40 new 1", "/v/d 80 moved 1"] {
        assert!(runc.contains(expected), "{runc}");
    }
    assert_eq!(ours, runc);
}

/// Prints which events of a kind of change are told, within a time.
const DEVELOPER: &str = r#"
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(0)
libc.inotify_add_watch(watch, b"/v", 0x100 | 0x2 | 0x80)
open("/v/ready", "w").close()
seen = b""
while b"last" not in seen:
    if not select.select([watch], [], [], 30)[0]: break
    seen += os.read(watch, 65536)
    # Whoever is told of a change reads what has changed.
    if b"source" in seen: print(open("/v/source").read().strip()); seen = b""
"#;

#[test]
fn who_is_told_of_a_change_reads_it() {
    let [runc, ours] = ask(|volume| {
        let watcher = volume.python_until_ready(DEVELOPER);
        change(volume, "echo first > .edited; mv .edited source");
        change(volume, "echo second and longer > .edited; mv .edited source");
        // A container of another pod.
        let bind = bundle::bind(&volume.path, "/v", &["rbind"]);
        let neighbour = Bundle::script("echo third > /v/.edited; mv /v/.edited /v/source");
        let neighbour = neighbour.unwrap().mount(bind).unwrap();
        let (status, _, errors) = told(&volume.runtime.run("other", &neighbour).unwrap());
        assert_eq!(status, Some(0), "{errors}");
        change(volume, "mkdir last");
        said(watcher)
    });
    assert_eq!(runc, "first\nsecond and longer\nthird");
    assert_eq!(ours, runc);
}
