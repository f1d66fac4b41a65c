//! A container with a file system of the host at `/v`, asked by programs of Python.

use std::fs;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use bulkhead_tests::bundle::{self, Bundle};
use bulkhead_tests::runtime::{Runtime, comes_true};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

/// What a program of Python asks for at first.
const IMPORTS: &str =
    "import ctypes,errno,fcntl,mmap,os,select,signal,socket,stat,struct,sys,time\n";

/// A container with the host's Python, and a file system of the host at `/v`.
pub(crate) struct Volume {
    pub(crate) runtime: Runtime,
    pub(crate) path: PathBuf,
    _bundle: Bundle,
    _directory: TempDir,
}

impl Volume {
    fn start(runtime: Runtime) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("volume");
        fs::create_dir(&path).unwrap();
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(path.join("file"), "old").unwrap();
        let bundle = Bundle::new(&["/bin/sleep", "1000"]).unwrap();
        let bundle = bundle.mount(bundle::bind(&path, "/v", &["rbind"])).unwrap();
        let bundle = bundle.with_usr_of_the_host().unwrap();
        let bundle = bundle.with_capability("CAP_SYS_ADMIN").unwrap();
        runtime.create("c", &bundle).unwrap();
        runtime.ok(&["start", "c"]).unwrap();
        Self { runtime, path, _bundle: bundle, _directory: directory }
    }

    /// What a program prints.
    pub(crate) fn python(&self, program: &str) -> String {
        let program = format!("{IMPORTS}{program}");
        let said = self.runtime.ok(&["exec", "c", "/usr/bin/python3", "-c", &program]).unwrap();
        said.trim().to_owned()
    }

    /// Starts a program that makes the file `ready` when it is; waits for it.
    pub(crate) fn python_until_ready(&self, program: &str) -> Child {
        let program = format!("{IMPORTS}{program}");
        let arguments = ["exec", "c", "/usr/bin/python3", "-c", &program];
        let mut command = self.runtime.command(&arguments);
        let child = command.stdout(Stdio::piped()).spawn().unwrap();
        let ready = self.path.join("ready");
        assert!(comes_true(Duration::from_secs(30), || ready.exists()), "it did not start");
        fs::remove_file(ready).unwrap();
        child
    }

    fn end(self) {
        self.runtime.ok(&["delete", "--force", "c"]).unwrap();
        unmount(&self.path, UnmountFlags::empty()).unwrap();
        self.runtime.assert_clean().unwrap();
    }
}

/// What a child prints until its end.
pub(crate) fn said(mut child: Child) -> String {
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success());
    text.trim().to_owned()
}

/// Asks a container of runc and one of ours.
pub(crate) fn ask(question: fn(&Volume) -> String) -> [String; 2] {
    [Runtime::runc(), Runtime::new()].map(|runtime| {
        let volume = Volume::start(runtime.unwrap());
        let answer = question(&volume);
        volume.end();
        answer
    })
}
