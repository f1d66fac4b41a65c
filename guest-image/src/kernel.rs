//! Builds a kernel from a fragment: `make tinyconfig`, the fragment, `make olddefconfig`, the check
//! that every request was granted, `make vmlinux modules`, pack. The result is the uncompressed ELF file,
//! which is what the monitor and QEMU load.
//!
//! The kernel is kept in the cache under the hash of the fragment, the source, the tools and
//! `RECIPE`, so a second call only looks it up. User, host and time are set to fixed values, so the
//! same inputs give the same kernel.
//!
//! The object files stay in the cache too. So a changed fragment recompiles only the files that its
//! options affect, and a first build that was interrupted continues.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::progress::{Step, say};
use crate::source::{Patch, Source};
use crate::{cache, elf, kconfig, modules};

/// Increased when this file builds a different kernel from the same inputs.
const RECIPE: &str = "2";
/// How much of make's log an error shows.
const LOG_LINES: usize = 25;

/// A kernel to build.
#[derive(Debug, Clone, Copy)]
pub struct Recipe<'a> {
    /// Its name in messages and in the cache: `guest` or `host`.
    pub name: &'a str,
    /// The text of the fragment.
    pub fragment: &'a str,
    /// What is changed in the source, in this order.
    pub patches: &'a [Patch<'a>],
}

impl<'a> Recipe<'a> {
    /// The texts of the patches.
    fn changes(self) -> impl Iterator<Item = &'a str> {
        self.patches.iter().map(|patch| patch.text)
    }
}

/// A kernel in the cache.
#[derive(Debug)]
pub struct Kernel {
    /// The ELF file with only its loaded parts.
    pub vmlinux: PathBuf,
    /// The symbol map, `System.map`.
    pub symbols: PathBuf,
    /// Its modules ([`modules::pack`]), if the fragment asks for any.
    pub modules: PathBuf,
}

/// A file of `guest-image/kernel/patches/`.
macro_rules! patch {
    ($name:literal) => {
        Patch { name: $name, text: include_str!(concat!("../kernel/patches/", $name)) }
    };
}

/// What the guest's kernel has beyond its source. Seven decisions say why:
/// `docs/decisions/0021-memory-on-demand.md`, `docs/decisions/0022-the-guests-clock.md`,
/// `docs/decisions/0023-files-of-two-kinds.md`, `docs/decisions/0024-modules.md`,
/// `docs/decisions/0028-changes-by-others.md`, `docs/decisions/0030-fifos-in-shared-directories.md`
/// and `docs/decisions/0031-sockets-in-directories.md`.
const PATCHES: [Patch<'static>; 14] = [
    patch!("0001-mm-count-ram-that-is-plugged-on-demand.patch"),
    patch!("0002-timekeeping-show-how-far-the-persistent-clock-is-ahead.patch"),
    patch!("0003-fuse-locks-of-this-kernel-and-of-others.patch"),
    patch!("0004-lockdown-do-not-ask-for-signed-modules.patch"),
    patch!("0005-fuse-write-mappings-back-soon.patch"),
    patch!("0006-fuse-forget-what-is-idle.patch"),
    patch!("0007-fuse-watch-what-others-change.patch"),
    patch!("0008-fuse-submounts-have-the-flags-of-their-connection.patch"),
    patch!("0009-fuse-stat-uses-what-its-lookup-brought.patch"),
    patch!("0010-fuse-no-flush-for-who-only-reads.patch"),
    patch!("0011-fuse-fifos-that-others-use.patch"),
    patch!("0012-unix-fuse-sockets-that-others-use-too.patch"),
    patch!("0013-fuse-mappings-see-what-others-write.patch"),
    patch!("0014-unix-fuse-datagrams-to-other-kernels.patch"),
];

/// The kernel of a pod.
#[must_use]
pub const fn guest() -> Recipe<'static> {
    const FRAGMENT: &str =
        concat!(include_str!("../kernel/x86_64.config"), include_str!("../kernel/modules.config"));
    Recipe { name: "guest", fragment: FRAGMENT, patches: &PATCHES }
}

/// Builds the kernel unless the cache has it.
///
/// # Errors
/// When the source or a tool is missing, an option of the fragment is not granted (each is named), or
/// make fails (with the last lines of its log).
pub fn build(recipe: Recipe<'_>, source: &Source) -> Result<Kernel> {
    let requested = kconfig::parse(recipe.fragment)
        .with_context(|| format!("fragment of the {} kernel", recipe.name))?;
    let cache = cache::directory()?;
    let entry = cache.join(format!("kernel-{}-{:.16}", recipe.name, inputs(recipe, source)?));
    let kernel = Kernel {
        vmlinux: entry.join("vmlinux"),
        symbols: entry.join("System.map"),
        modules: entry.join("modules"),
    };
    if kernel.vmlinux.exists() {
        return Ok(kernel);
    }
    let waiting = || say("waiting for another build of the same kernel");
    let _lock = cache::lock(&cache, &format!("kernel-{}", recipe.name), waiting)?;
    if kernel.vmlinux.exists() {
        return Ok(kernel);
    }
    let tree = source.unpack(&cache, recipe.patches)?;
    let objects = Objects::open(&cache, recipe, source)?;
    let log = cache.join(format!("kernel-{}.log", recipe.name));
    cache::publish(&entry, |partial| {
        let make = Make::new(&tree, &objects.directory, &log)?;
        configure(recipe, &requested, &make)?;
        objects.change(|| compile(recipe, &requested, &make))?;
        keep(&make.build, has_modules(&requested), partial)
    })?;
    Ok(kernel)
}

/// The object files of all kernels of one name, source and compiler.
///
/// The kernel's make files treat an object as complete if its command is saved beside it, which is
/// written after the object. So after a first build was interrupted, make finds the incomplete
/// objects. In a later build the file from the previous build already exists, so make does not find
/// them.
struct Objects {
    directory: PathBuf,
}

impl Objects {
    /// Exists once make has ended by itself.
    const WHOLE: &str = "whole";
    /// Exists instead while make runs again.
    const CHANGING: &str = "changing";

    /// Opens the objects of the previous build; removes them if a later build was interrupted. The
    /// caller holds the lock of that kernel.
    fn open(cache: &Path, recipe: Recipe<'_>, source: &Source) -> Result<Self> {
        let (gcc, ld) = (version("gcc")?, version("ld")?);
        let inputs = [RECIPE, &source.identity(), &gcc, &ld];
        let key = cache::key(inputs.into_iter().chain(recipe.changes()));
        let directory = cache.join(format!("objects-{}-{key:.16}", recipe.name));
        if directory.join(Self::CHANGING).exists() {
            cache::remove(&directory)?;
        }
        fs::create_dir_all(&directory)
            .with_context(|| format!("create {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// Runs `work`, which changes the objects, and records that it ended, with or without an error.
    fn change(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let (whole, changing) =
            (self.directory.join(Self::WHOLE), self.directory.join(Self::CHANGING));
        if whole.exists() {
            fs::rename(&whole, &changing).context("mark the objects")?;
        }
        let result = work();
        File::create(&whole).context("mark the objects")?;
        if changing.exists() {
            fs::remove_file(&changing).context("mark the objects")?;
        }
        result
    }
}

/// The hash of all inputs of a build.
fn inputs(recipe: Recipe<'_>, source: &Source) -> Result<String> {
    let (gcc, ld) = (version("gcc")?, version("ld")?);
    let inputs = [RECIPE, recipe.fragment, &source.identity(), &gcc, &ld];
    Ok(cache::key(inputs.into_iter().chain(recipe.changes())))
}

fn version(tool: &str) -> Result<String> {
    let output = Command::new(tool)
        .arg("--version")
        .output()
        .with_context(|| format!("run {tool} (apt-get install gcc binutils)"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// One build directory, in which make is run.
struct Make {
    tree: PathBuf,
    build: PathBuf,
    log: PathBuf,
}

impl Make {
    fn new(tree: &Path, build: &Path, log: &Path) -> Result<Self> {
        File::create(log).with_context(|| format!("create {}", log.display()))?;
        Ok(Self { tree: tree.to_owned(), build: build.to_owned(), log: log.to_owned() })
    }

    /// Runs make; every line of its output goes to the log and to `line`.
    fn run(&self, targets: &[&str], mut line: impl FnMut(&str)) -> Result<()> {
        let mut log = OpenOptions::new().append(true).open(&self.log)?;
        let jobs = thread::available_parallelism().map_or(1, usize::from);
        let mut command = Command::new("make");
        for variable in
            ["MAKEFLAGS", "MAKELEVEL", "ARCH", "CROSS_COMPILE", "KCFLAGS", "LOCALVERSION"]
        {
            command.env_remove(variable);
        }
        let mut child = command
            .arg("-C")
            .arg(&self.tree)
            .arg(joined("O=", &self.build))
            .arg(format!("-j{jobs}"))
            .args(targets)
            .env("LC_ALL", "C")
            .env("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970")
            .env("KBUILD_BUILD_USER", "bulkhead")
            .env("KBUILD_BUILD_HOST", "bulkhead")
            // Otherwise make counts the builds in a directory.
            .env("KBUILD_BUILD_VERSION", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.try_clone()?)
            .spawn()
            .context("run make (apt-get install make)")?;
        let output = child.stdout.take().context("make has no output")?;
        for text in BufReader::new(output).lines() {
            let text = text.context("read the output of make")?;
            writeln!(log, "{text}").context("write the log of make")?;
            line(&text);
        }
        let status = child.wait().context("wait for make")?;
        ensure!(
            status.success(),
            "make {} failed ({status}); the end of {}:\n{}",
            targets.join(" "),
            self.log.display(),
            last_lines(&self.log)?
        );
        Ok(())
    }
}

fn configure(recipe: Recipe<'_>, requested: &kconfig::Options, make: &Make) -> Result<()> {
    let step = Step::start(format!("{} kernel: configure", recipe.name));
    let path = make.build.join(".config");
    make.run(&["tinyconfig"], |_| ())?;
    let mut config = OpenOptions::new().append(true).open(&path)?;
    config.write_all(recipe.fragment.as_bytes()).context("append the fragment")?;
    make.run(&["olddefconfig"], |_| ())?;
    let granted = kconfig::parse(&fs::read_to_string(&path)?).context("parse .config")?;
    let unmet = kconfig::unmet(requested, &granted);
    if !unmet.is_empty() {
        bail!("the {} kernel's fragment is not granted:\n  {}", recipe.name, unmet.join("\n  "));
    }
    step.done(&format!("{} options as requested", requested.len()));
    Ok(())
}

fn compile(recipe: Recipe<'_>, requested: &kconfig::Options, make: &Make) -> Result<()> {
    let targets: &[&str] =
        if has_modules(requested) { &["vmlinux", "modules"] } else { &["vmlinux"] };
    let mut step = Step::start(format!("{} kernel: compile", recipe.name));
    let mut files = 0;
    make.run(targets, |line| {
        if let Some(file) = line.trim_start().strip_prefix("CC ") {
            files += 1;
            step.update(&format!("{files} files, at {}", file.trim()));
        }
    })?;
    step.done(&format!("{files} files"));
    Ok(())
}

/// Whether the fragment asks for modules; without them make refuses to build them.
fn has_modules(requested: &kconfig::Options) -> bool {
    requested.get("MODULES").is_some_and(Option::is_some)
}

/// Packs the linked kernel and the modules, and keeps the symbol map for reading back traces.
fn keep(build: &Path, with_modules: bool, entry: &Path) -> Result<()> {
    let linked = fs::read(build.join("vmlinux")).context("read the linked kernel")?;
    let packed = elf::pack(&linked).context("pack the linked kernel")?;
    fs::write(entry.join("vmlinux"), packed).context("write the packed kernel")?;
    if with_modules {
        let packed = modules::pack(build).context("pack the modules")?;
        fs::write(entry.join("modules"), packed).context("write the modules")?;
    }
    for (from, to) in [(".config", "config"), ("System.map", "System.map")] {
        fs::copy(build.join(from), entry.join(to)).with_context(|| format!("keep {from}"))?;
    }
    Ok(())
}

fn last_lines(log: &Path) -> Result<String> {
    let file = File::open(log).with_context(|| format!("open {}", log.display()))?;
    let mut lines = VecDeque::with_capacity(LOG_LINES);
    for line in BufReader::new(file).lines() {
        if lines.len() == LOG_LINES {
            lines.pop_front();
        }
        lines.push_back(line.context("read the log of make")?);
    }
    Ok(Vec::from(lines).join("\n"))
}

fn joined(prefix: &str, path: &Path) -> impl AsRef<OsStr> {
    let mut text = std::ffi::OsString::from(prefix);
    text.push(path);
    text
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn every_input_changes_the_hash() {
        let source = |version: &str| Source::Debian { version: version.to_owned() };
        let recipe = |fragment| Recipe { name: "guest", fragment, patches: &[] };
        let first = inputs(recipe("CONFIG_A=y\n"), &source("1")).unwrap();
        assert_eq!(first, inputs(recipe("CONFIG_A=y\n"), &source("1")).unwrap());
        assert_ne!(first, inputs(recipe("CONFIG_A=n\n"), &source("1")).unwrap());
        assert_ne!(first, inputs(recipe("CONFIG_A=y\n"), &source("2")).unwrap());
        let patches = &[Patch { name: "a", text: "" }];
        let patched = Recipe { patches, ..recipe("CONFIG_A=y\n") };
        assert_ne!(first, inputs(patched, &source("1")).unwrap());
    }

    #[test]
    fn what_the_guests_kernel_is_said_to_lack_it_does_not_ask_for() {
        let requested = kconfig::parse(guest().fragment).unwrap();
        let has = |name: &str| requested.get(name).is_some_and(Option::is_some);
        let rows = include_str!("../../docs/KERNEL.md").lines();
        let names = rows.filter(|row| row.starts_with("| `")).flat_map(|row| {
            row.split('|').nth(1).into_iter().flat_map(|cell| cell.split('`').skip(1).step_by(2))
        });
        let (has, lacks): (Vec<_>, Vec<_>) = names.partition(|name| has(name));
        assert!(has.is_empty(), "docs/KERNEL.md says that these are left out: {has:?}");
        assert!(lacks.len() > 50, "{lacks:?}");
    }

    #[test]
    fn objects_are_kept_unless_a_later_build_was_interrupted() {
        let cache = tempfile::tempdir().unwrap();
        let recipe = Recipe { name: "guest", fragment: "", patches: &[] };
        let source = Source::Debian { version: "1".to_owned() };
        let open = || Objects::open(cache.path(), recipe, &source).unwrap();
        let has_one = |objects: &Objects| objects.directory.join("one.o").exists();
        let interrupted = |objects: &Objects| {
            let work = || objects.change(|| panic!("interrupted"));
            assert!(catch_unwind(AssertUnwindSafe(work)).is_err());
        };

        let first = open();
        fs::write(first.directory.join("one.o"), "").unwrap();
        interrupted(&first);
        // The next build continues from there; after an error of make the objects are complete too.
        assert!(has_one(&open()));
        open().change(|| bail!("a mistake in the source")).unwrap_err();
        open().change(|| Ok(())).unwrap();
        assert!(has_one(&open()));
        // Now it is unknown which objects are complete.
        interrupted(&open());
        assert!(!has_one(&open()));
    }

    #[test]
    fn failing_make_shows_the_end_of_its_log() {
        let directory = tempfile::tempdir().unwrap();
        let noise: String = (0..100).map(|line| format!("\t@echo noise {line}\n")).collect();
        let rule = format!("vmlinux:\n{noise}\t@echo broken file >&2; false\n");
        fs::write(directory.path().join("Makefile"), rule).unwrap();
        let build = directory.path().join("build");
        fs::create_dir(&build).unwrap();
        let make = Make::new(directory.path(), &build, &directory.path().join("log")).unwrap();
        let error = make.run(&["vmlinux"], |_| ()).unwrap_err().to_string();
        assert!(error.contains("broken file") && !error.contains("noise 1\n"), "{error}");
    }
}
