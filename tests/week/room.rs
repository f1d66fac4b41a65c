//! Containers of one runtime with a root file system of Debian, each with layers of its own, and a
//! volume that they share.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::netns::{self, Namespace};
use bulkhead_tests::runtime::{Runtime, finish_within, output, told};
use bulkhead_tests::tools;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::table;

/// A timeout for hangs. Some programs take many minutes in emulation.
const PATIENCE: Duration = Duration::from_secs(1500);

/// Which Debian is the root file system.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Debian {
    /// With the programs that every run of the suite uses.
    Few,
    /// With those of the long tests.
    More,
}

/// Where each [`Debian`] is mounted, once one has asked for it. They stay until the test host ends.
static MOUNTED: [Mutex<Option<TempDir>>; 2] = [Mutex::new(None), Mutex::new(None)];

impl Debian {
    fn path(self) -> PathBuf {
        let name = ["few", "more"][self as usize];
        let mut mounted = MOUNTED[self as usize].lock().unwrap_or_else(PoisonError::into_inner);
        let directory = mounted.get_or_insert_with(|| {
            let directory = TempDir::with_prefix("debian-").unwrap();
            let file =
                Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../target/week-{name}.ext4"));
            assert!(file.exists(), "no {}: `cargo xtask test` makes it", file.display());
            succeed(command("mount", &["-o", "loop,ro"]).args([&file, directory.path()]));
            directory
        });
        directory.path().to_owned()
    }
}

/// Runs a program's week under runc and under Bulkhead. What `week` returns is what the program did;
/// it must be `right` under both.
pub(crate) fn same(
    program: &'static str,
    debian: Debian,
    right: &str,
    week: impl Fn(&Room) -> String,
) {
    let [theirs, ours] =
        [Runtime::runc(), Runtime::new()].map(|runtime| timed(runtime.unwrap(), debian, &week));
    table::add(program, [Some(theirs.1), Some(ours.1)]);
    assert_eq!(theirs.0.trim(), right.trim(), "under runc");
    assert_eq!(ours.0.trim(), right.trim(), "under Bulkhead");
}

/// Runs a program's week under Bulkhead alone, where the test host's kernel cannot do what the
/// guest's can.
pub(crate) fn alone(
    program: &'static str,
    debian: Debian,
    right: &str,
    week: impl Fn(&Room) -> String,
) {
    let (did, took) = timed(Runtime::new().unwrap(), debian, &week);
    table::add(program, [None, Some(took)]);
    assert_eq!(did.trim(), right.trim());
}

fn timed(runtime: Runtime, debian: Debian, week: impl Fn(&Room) -> String) -> (String, Duration) {
    let room = Room::new(runtime, debian);
    let started = Instant::now();
    let did = week(&room);
    let took = started.elapsed();
    room.end();
    (did, took)
}

/// A disk of the host with the layers of containers and their volume.
pub(crate) struct Room {
    pub(crate) runtime: Runtime,
    debian: PathBuf,
    disk: Mounted,
}

impl Room {
    fn new(runtime: Runtime, debian: Debian) -> Self {
        let disk = Mounted::disk();
        fs::create_dir(disk.path.join("volume")).unwrap();
        Self { runtime, debian: debian.path(), disk }
    }

    /// The volume on the host; containers have it at `/v`.
    pub(crate) fn volume(&self) -> PathBuf {
        self.disk.path.join("volume")
    }

    /// A container that is not started yet, whose first process is this shell script.
    pub(crate) fn container(&self, id: &'static str, script: &str) -> Container<'_> {
        let root = Mounted::overlay(&self.debian, &self.disk.path.join(id));
        fs::write(root.path.join("etc/hosts"), format!("127.0.0.1 localhost {id}\n")).unwrap();
        let bundle = Bundle::new(&["/bin/sh", "-ec", script]).unwrap();
        let bundle = bundle.with(|spec| {
            spec["root"]["path"] = json!(root.path);
            spec["hostname"] = json!(id);
            spec["process"]["env"] = json!([
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME=/root",
                "LC_ALL=C.UTF-8",
            ]);
            spec["process"]["noNewPrivileges"] = json!(false);
            let limit = json!({"type": "RLIMIT_NOFILE", "hard": 65536, "soft": 65536});
            spec["process"]["rlimits"] = json!([limit]);
        });
        let bundle = bundle.unwrap().mount(bind(&self.volume(), "/v", &["rbind"])).unwrap();
        Container { room: self, id, bundle: Some(bundle), _root: root }
    }

    /// A container that sleeps until it is told what to do.
    pub(crate) fn waiting(&self, id: &'static str) -> Container<'_> {
        self.container(id, "exec sleep infinity")
    }

    fn end(self) {
        let Self { runtime, disk, .. } = self;
        runtime.assert_clean().unwrap();
        drop(disk);
    }
}

/// A container of a [`Room`], with a layer of its own that outlives its processes.
pub(crate) struct Container<'a> {
    room: &'a Room,
    id: &'static str,
    /// Always there, but while it is changed.
    bundle: Option<Bundle>,
    _root: Mounted,
}

impl Container<'_> {
    /// Changes the specification.
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Value)) -> Self {
        self.bundle = self.bundle.take().map(|bundle| bundle.with(change).unwrap());
        self
    }

    /// Gives it a capability beyond Docker's.
    pub(crate) fn with_capability(mut self, name: &str) -> Self {
        self.bundle = self.bundle.take().map(|bundle| bundle.with_capability(name).unwrap());
        self
    }

    /// Gives it the device of tunnels.
    pub(crate) fn with_tun(self) -> Self {
        self.with(|spec| {
            let node = json!({"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200,
                "fileMode": 0o666});
            spec["linux"]["devices"] = json!([node]);
            let rule =
                json!({"allow": true, "type": "c", "major": 10, "minor": 200, "access": "rwm"});
            spec["linux"]["resources"]["devices"].as_array_mut().unwrap().push(rule);
        })
    }

    /// Limits its memory.
    pub(crate) fn with_memory(self, bytes: u64) -> Self {
        self.with(|spec| spec["linux"]["resources"]["memory"] = json!({ "limit": bytes }))
    }

    /// Gives it all privileges, as `docker run --privileged` does.
    pub(crate) fn privileged(mut self) -> Self {
        self.bundle = self.bundle.take().map(|bundle| tools::empower(bundle).unwrap());
        self
    }

    /// Gives it a network.
    pub(crate) fn on(mut self, network: &Namespace) -> Self {
        self.bundle = self.bundle.take().map(|bundle| network.of(bundle).unwrap());
        self
    }

    fn bundle(&self) -> &Bundle {
        self.bundle.as_ref().unwrap()
    }

    /// Starts it, for the first time or again.
    pub(crate) fn start(&self) {
        let log = File::options().create(true).append(true).open(self.log_file()).unwrap();
        let mut command = self.room.runtime.command(&["run", "--detach", "--bundle"]);
        command.arg(self.bundle().path()).arg(self.id);
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let status = command.status().unwrap();
        assert!(status.success(), "{}: {status}\n{}", self.id, self.log());
    }

    /// Starts it, and waits until a command in it succeeds.
    pub(crate) fn start_until(&self, ready: &str) {
        self.start();
        self.until(ready);
    }

    /// Waits until a command in it succeeds.
    pub(crate) fn until(&self, ready: &str) {
        let turns = format!(
            "for turn in $(seq 3000); do if {ready}; then exit 0; fi > /tmp/ready 2>&1; sleep 0.2; \
             done; cat /tmp/ready; exit 1"
        );
        self.exec(&turns);
    }

    /// Runs it to its end, which must be a success; returns what it printed.
    pub(crate) fn run(&self) -> String {
        self.finish(self.room.runtime.spawn_run(self.id, self.bundle()).unwrap())
    }

    /// What a further process prints; it must succeed.
    pub(crate) fn exec(&self, script: &str) -> String {
        self.finish(self.spawn(script))
    }

    fn finish(&self, child: Child) -> String {
        let (status, out, errors) = told(&finish_within(child, PATIENCE).unwrap());
        let id = self.id;
        assert_eq!(
            status,
            Some(0),
            "{id} under {} said\n{out}\n{errors}\nits log\n{}",
            self.room.runtime.name(),
            self.log()
        );
        out.trim().to_owned()
    }

    /// Starts a further process whose output is piped.
    pub(crate) fn spawn(&self, script: &str) -> Child {
        self.command(script).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Starts a further process that prints numbers, each a promise of the program, and returns the
    /// first of them that is this or more.
    pub(crate) fn told_until(&self, script: &str, enough: u64) -> (u64, Telling) {
        let mut child = self.spawn(script);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut numbers = lines.by_ref().map_while(|line| line.ok()?.trim().parse().ok());
        let told = numbers.find(|number| *number >= enough);
        let Some(told) = told else {
            panic!("{} told too little: {:?}", self.id, child.wait_with_output())
        };
        (told, Telling { child, lines })
    }

    fn command(&self, script: &str) -> Command {
        self.room.runtime.command(&["exec", self.id, "/bin/sh", "-ec", script])
    }

    /// Sends a signal to its first process, and waits until it has ended.
    pub(crate) fn end_by(&self, signal: &str) {
        let runtime = &self.room.runtime;
        runtime.ok(&["kill", self.id, signal]).unwrap();
        self.ended_by_itself();
    }

    /// Waits until its first process has ended.
    pub(crate) fn ended_by_itself(&self) {
        let runtime = &self.room.runtime;
        runtime.wait_for_status(self.id, "stopped").unwrap();
        runtime.ok(&["delete", self.id]).unwrap();
    }

    /// What it has printed since it exists.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.room.disk.path.join(self.id).join("log")
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // Without the option it would fail when the container has ended by itself.
        let _ = self.room.runtime.call(&["delete", "--force", self.id]);
    }
}

/// A process that prints numbers.
pub(crate) struct Telling {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Telling {
    /// The last number that it printed before it was killed, but for one that may be cut off.
    pub(crate) fn last_number(mut self) -> u64 {
        let lines: Vec<String> = self.lines.by_ref().map_while(Result::ok).collect();
        self.child.wait().unwrap();
        let [.., last, _] = &lines[..] else { return 0 };
        last.trim().parse().unwrap()
    }
}

/// A mount that is removed when this is dropped.
struct Mounted {
    path: PathBuf,
    /// The directory of a disk's file.
    _directory: Option<TempDir>,
}

impl Mounted {
    /// A disk of the host: a file with an ext4 file system.
    fn disk() -> Self {
        let directory = TempDir::with_prefix("week-").unwrap();
        let (file, path) = (directory.path().join("disk"), directory.path().join("mounted"));
        File::create(&file).unwrap().set_len(4 << 30).unwrap();
        fs::create_dir(&path).unwrap();
        succeed(command("mkfs.ext4", &["-q"]).arg(&file));
        succeed(command("mount", &["-o", "loop"]).args([&file, &path]));
        Self { path, _directory: Some(directory) }
    }

    /// An overlay with all of its directories in one.
    fn overlay(lower: &Path, directory: &Path) -> Self {
        let [upper, work, path] = ["upper", "work", "root"].map(|name| directory.join(name));
        for directory in [&upper, &work, &path] {
            fs::create_dir_all(directory).unwrap();
        }
        let options = [("lowerdir", lower), ("upperdir", &upper), ("workdir", &work)];
        let options = options.map(|(name, path)| format!("{name}={}", path.display())).join(",");
        succeed(command("mount", &["-t", "overlay", "overlay", "-o", &options]).arg(&path));
        Self { path, _directory: None }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let status = command("umount", &[]).arg(&self.path).status().unwrap();
        assert!(status.success() || std::thread::panicking(), "umount {}", self.path.display());
    }
}

/// Two networks for containers, which reach each other over a bridge of the host.
pub(crate) struct Lan {
    /// The first has the address 10.8.0.1, the second 10.8.0.2.
    pub(crate) ends: [Namespace; 2],
}

impl Lan {
    pub(crate) fn new() -> Self {
        netns::ip("link add lan type bridge").unwrap();
        netns::ip("link set lan up").unwrap();
        let ends = [1, 2].map(|number| {
            let end = Namespace::new(&format!("end{number}")).unwrap();
            let link = format!("link add port{number} type veth peer name eth0 netns end{number}");
            netns::ip(&link).unwrap();
            netns::ip(&format!("link set port{number} master lan up")).unwrap();
            end.ip("link set eth0 up").unwrap();
            end.ip(&format!("address add 10.8.0.{number}/24 dev eth0")).unwrap();
            end
        });
        Self { ends }
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        for name in ["port1", "port2", "lan"] {
            // Fails when it went with its namespace.
            let _ = command("ip", &["link", "delete", name]).status();
        }
    }
}

fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

fn succeed(command: &mut Command) {
    let (status, _, errors) = told(&output(command).unwrap());
    assert_eq!(status, Some(0), "{command:?}: {errors}");
}
