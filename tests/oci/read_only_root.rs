//! A read-only root: in the container, beside runc, and on the host, where a guest that was taken
//! over cannot write to it either.

use std::fs;

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::runtime::{Runtime, told};
use serde_json::json;

/// A bundle with mount points, their parent directories and a working directory that the root does
/// not have.
fn bundle(file: &std::path::Path) -> Bundle {
    let script = "pwd; ls /made; cat /made/file; for at in / /made /made/here; do \
                  touch $at/new 2> /dev/null; echo $at $?; done; readlink /dev/fd; echo > /dev/null";
    let bundle = Bundle::script(script).unwrap();
    let tmpfs = json!({"destination": "/made/here", "type": "tmpfs", "source": "tmpfs"});
    let bundle = bundle.mount(tmpfs).unwrap();
    let below = json!({"destination": "/made/here/below", "type": "tmpfs", "source": "tmpfs"});
    let bundle = bundle.mount(below).unwrap().mount(bind(file, "/made/file", &["ro"])).unwrap();
    bundle
        .with(|spec| {
            spec["root"]["readonly"] = json!(true);
            spec["process"]["cwd"] = json!("/made/cwd");
        })
        .unwrap()
}

#[test]
fn it_has_what_runc_makes_in_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "of the host\n").unwrap();
    let seen = [Runtime::new().unwrap(), Runtime::runc().unwrap()].map(|runtime| {
        let bundle = bundle(file.path());
        let told = told(&runtime.run("root", &bundle).unwrap());
        runtime.assert_clean().unwrap();
        let made = bundle.rootfs().join("made");
        let mut left: Vec<_> =
            fs::read_dir(made).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        (told, left, fs::read_dir(bundle.rootfs().join("made/here")).unwrap().count())
    });
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0].0.0, Some(0), "{seen:?}");
    assert_eq!(seen[0].1, ["cwd", "file", "here"]);
}

/// The options with which a container's root is mounted in its file server.
fn on_the_host(readonly: bool) -> Vec<String> {
    let runtime = Runtime::new().unwrap();
    let bundle = Bundle::new(&["/bin/true"]).unwrap();
    let bundle = bundle.with(|spec| spec["root"]["readonly"] = json!(readonly)).unwrap();
    runtime.create("root", &bundle).unwrap();
    let options = runtime.shared_with("/", "/rootfs").unwrap();
    runtime.ok(&["delete", "--force", "root"]).unwrap();
    runtime.assert_clean().unwrap();
    options
}

#[test]
fn the_host_keeps_it_too() {
    for (readonly, mode) in [(true, "ro"), (false, "rw")] {
        let options = on_the_host(readonly);
        assert_eq!(options[0], mode, "{options:?}");
        let has = |name: &&str| options.iter().any(|option| option == name);
        assert!(["nosuid", "nodev", "noexec"].iter().all(has), "{options:?}");
    }
}
