//! Formats of binfmt_misc that the host has registered, beside runc: who runs the files, what the
//! interpreter is told, and what it sees of itself.
//!
//! All interpreters are shells, and all files begin with a comment by which the host's kernel knows
//! them, so that each file says what runs it.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::pod::Pod;
use bulkhead_tests::runtime::told;
use tempfile::TempDir;

const DIRECTORY: &str = "/proc/sys/fs/binfmt_misc";
/// A shell that runs as what its name says.
const SHELL: &str = "/bin/busybox";
/// What each file does.
const SAYS: &str = "\nreadlink /proc/$$/exe; tr '\\0' '|' < /proc/$$/cmdline; echo; \
                    grep Cap[EP] /proc/$$/status\n";

/// The host's formats, and the file system in which they are. What was registered is removed when
/// this is dropped.
struct Formats {
    names: Vec<String>,
    mounted: bool,
}

impl Formats {
    fn new() -> Self {
        let mounted = !Path::new(DIRECTORY).join("register").exists();
        if mounted {
            let mount = ["-t", "binfmt_misc", "none", DIRECTORY];
            assert!(Command::new("mount").args(mount).status().unwrap().success());
        }
        Self { names: Vec::new(), mounted }
    }

    /// Registers a format: the fields are those after its name, with a `|` before each.
    fn add(&mut self, name: &str, fields: &str) {
        let line = format!("|{name}{fields}");
        fs::write(Path::new(DIRECTORY).join("register"), line).unwrap();
        self.names.push(name.to_owned());
    }

    /// Registers a format whose interpreter is in a mount namespace of its own, which is gone
    /// afterwards. The fields are those between its name and the interpreter.
    fn add_and_leave(&mut self, name: &str, fields: &str) {
        let script = format!(
            "set -e; mount -t tmpfs none /mnt; mkdir /mnt/image; cp {SHELL} /mnt/image/sh; \
             echo '|{name}{fields}|/mnt/image/sh|F' > {DIRECTORY}/register"
        );
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
        assert!(unshare.status().unwrap().success());
        self.names.push(name.to_owned());
    }

    /// Enables or disables all of them.
    fn enable(&self, enabled: bool) {
        let word = if enabled { "1" } else { "0" };
        fs::write(Path::new(DIRECTORY).join("status"), word).unwrap();
    }
}

impl Drop for Formats {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = fs::write(Path::new(DIRECTORY).join(name), "-1");
        }
        self.enable(true);
        if self.mounted {
            let _ = Command::new("umount").arg(DIRECTORY).status();
        }
    }
}

/// Copies the shell to a directory of the host.
fn shell(directory: &Path) -> PathBuf {
    fs::create_dir_all(directory).unwrap();
    let shell = directory.join("sh");
    fs::copy(SHELL, &shell).unwrap();
    shell
}

/// The files of a container, by what their contents begin with.
const FILES: [(&str, &str); 13] = [
    ("/inside.bh-ext", "#"),
    ("/held", "#bh-held"),
    ("/linked", "#bh-linked"),
    ("/told", "#bh-told"),
    ("/masked", "#bXmasked\t"),
    ("/off.bh-off", "#"),
    ("/both", "#bh-both"),
    ("/pair", "#bh-pair"),
    ("/gone", "#bh-gone"),
    ("/gone.bh-out", "#"),
    ("/hidden", "#bh-hidden"),
    ("/deleted", "#bh-deleted"),
    ("/none", "#bh-none"),
];

fn container(script: &str) -> Bundle {
    let bundle = Bundle::script(script).unwrap().with_usr_of_the_host().unwrap();
    for (path, begin) in FILES {
        let path = bundle.rootfs().join(&path[1..]);
        fs::write(&path, format!("{begin}{SAYS}")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    }
    for name in ["older", "newer", "inside"] {
        fs::copy(SHELL, bundle.rootfs().join("bin").join(name)).unwrap();
    }
    bundle
}

/// Registers formats of each kind.
fn register(formats: &mut Formats, host: &Path) -> PathBuf {
    formats.add("bh-ext", "|E||bh-ext||/bin/sh|");
    let odd = shell(&host.join("odd: dir;"));
    formats.add("bh-held", &format!("|M|1|bh-held||{}|F", odd.display()));
    // The name of the link is what the shell is run as.
    let link = host.join("bin/sh");
    fs::create_dir(host.join("bin")).unwrap();
    symlink("../odd: dir;/sh", &link).unwrap();
    formats.add("bh-linked", &format!("|M||#bh-linked||{}|F", link.display()));
    formats.add("bh:told", &format!("|M||#bh-told||{}|POCF", odd.display()));
    let masked = r"|M|0|#b\x00masked\x09|\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff|/bin/sh|";
    formats.add("bh-masked", masked);
    formats.add("bh-off", &format!("|E||bh-off||{}|F", odd.display()));
    fs::write(Path::new(DIRECTORY).join("bh-off"), "0").unwrap();
    // By name, the newer one is the first here, and the last below.
    formats.add("bh-m", "|M||#bh-both||/bin/ash|");
    formats.add("bh-a", "|M||#bh-bot||/bin/sh|");
    formats.add("bh-n", "|M||#bh-pai||/bin/ash|");
    formats.add("bh-z", "|M||#bh-pair||/bin/sh|");
    formats.add_and_leave("bh-gone", "|M||#bh-gone|");
    formats.add_and_leave("bh-out", "|E||bh-out|");
    formats.add_and_leave("bh-hidden", "|M||#bh-hidden|");
    formats.add("bh-hiding", "|M||#bh-hid||/bin/sh|");
    let deleted = shell(&host.join("deleted"));
    formats.add("bh-deleted", &format!("|M||#bh-deleted||{}|F", deleted.display()));
    fs::remove_file(&deleted).unwrap();
    formats.add("bh-none", "|M||#bh-none||/nowhere/sh|");
    odd
}

#[test]
fn the_hosts_formats_hold_in_a_container() {
    let host = TempDir::with_prefix("formats-").unwrap();
    let mut formats = Formats::new();
    let odd = register(&mut formats, host.path());
    let odd = odd.display();
    let run = FILES.map(|(path, _)| format!("echo \"$ {path}\"; {path} a 'b c'; echo $?\n"));
    let users = "/usr/bin/unshare -Ur /held x; busybox ls /proc/sys/fs/binfmt_misc\n";
    let script = format!("exec 2>&1\n{}{users}", run.concat());

    let pods = Pod::beside_runc().unwrap();
    let [ours, theirs] =
        pods.each_ref().map(|pod| told(&pod.run("formats", &mut container(&script)).unwrap()));
    // Only the host knows that the file has lost its name.
    assert_eq!((ours.0, ours.1.as_str()), (theirs.0, &*theirs.1.replace(" (deleted)", "")));
    for lines in [
        "$ /inside.bh-ext\n/bin/busybox\n/bin/sh|/inside.bh-ext|a|b c|\n",
        &format!("$ /held\n{odd}\n{odd}|/held|a|b c|\n"),
        "$ /gone\n/image/sh\n/mnt/image/sh|/gone|a|b c|\n",
        "$ /gone.bh-out\n/image/sh\n/mnt/image/sh|/gone.bh-out|a|b c|\n",
        "$ /both\n/bin/busybox\n/bin/sh|/both|a|b c|\n",
        "$ /pair\n/bin/busybox\n/bin/sh|/pair|a|b c|\n",
    ] {
        assert!(ours.1.contains(lines), "{lines}\n{}", ours.1);
    }
    let log = fs::read_to_string(pods[0].runtime().root().join("keeper/supervisor.log")).unwrap();
    let left_out: Vec<_> =
        log.lines().filter(|line| line.contains("a format of the host")).collect();
    let [line] = left_out[..] else { panic!("{log}") };
    assert!(line.contains("bh-hidden") && line.contains("newer formats"), "{line}");
    Pod::end_all(pods).unwrap();

    formats.enable(false);
    let pods = Pod::beside_runc().unwrap();
    let [ours, theirs] =
        pods.each_ref().map(|pod| told(&pod.run("formats", &mut container("/held")).unwrap()));
    assert_eq!(ours, theirs);
    assert!(ours.1.starts_with("/bin/busybox\n"), "{}", ours.1);
    Pod::end_all(pods).unwrap();
}
