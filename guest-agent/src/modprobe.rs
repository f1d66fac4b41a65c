//! What modprobe(8) is to other kernels: the kernel runs this program, as `modprobe -q -- ALIAS`,
//! when something in the pod asks for what a module has.
//!
//! A process in a container chooses the alias: it mounts a file system, opens a socket, adds a rule.
//! So the alias is only compared with those in the index. The modules are in one file of the host,
//! whose format `guest-image/src/modules.rs` describes; the host is trusted.
//!
//! The kernel runs no other program than this one (`CONFIG_STATIC_USERMODEHELPER_PATH`), whatever
//! `kernel.core_pattern` or `kernel.modprobe` say, and with any other arguments it does nothing.

// UNSAFETY: rustix and nix have no wrapper of init_module(2).
#![expect(unsafe_code, reason = "init_module(2) is called directly")]

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::ExitCode;

use bulkhead_protocol::{MODULES_FILE, SHARE_DIR};
use rustix::process::{Pid, getppid};

/// The name of the format and its version.
const FORMAT: &str = "bulkhead-modules 1";
/// The length of the first line.
const FIRST_LINE: usize = 32;
/// The largest index that is read.
const INDEX_MAX: usize = 1 << 20;
/// The largest module that is read.
const MODULE_MAX: usize = 32 << 20;
/// The longest alias: the kernel's own limit is `MODULE_NAME_LEN` or less.
const ALIAS_MAX: usize = 128;
/// Where the kernel shows its own notes, with its build id.
const NOTES: &str = "/sys/kernel/notes";

/// Why a module was not loaded.
#[derive(Debug, thiserror::Error)]
enum ModprobeError {
    #[error("cannot read the file of modules: {0}")]
    Read(#[source] io::Error),
    #[error("the file of modules is not one: {0}")]
    Format(&'static str),
    #[error("the file of modules is of another kernel")]
    OtherKernel,
    #[error("cannot load module {0}: {1}")]
    Load(String, #[source] io::Error),
}

/// Whether the kernel started this program as a helper: with the arguments for modprobe, or with
/// any others, which a container may have chosen (`kernel.core_pattern`). Such a process must have
/// none of this program's other lives.
pub(crate) fn is_asked(arguments: &[String]) -> bool {
    asked(arguments).is_some() || getppid().is_some_and(is_kernel_thread)
}

/// Whether a process has no program.
fn is_kernel_thread(process: Pid) -> bool {
    let directory = format!("/proc/{}", process.as_raw_nonzero());
    let program = fs::read_link(format!("{directory}/exe"));
    program.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        && fs::exists(directory).unwrap_or(false)
}

/// The alias, if these arguments (without the program's name) are those of the kernel.
fn asked(arguments: &[String]) -> Option<&str> {
    match arguments {
        [quiet, end, alias] if quiet == "-q" && end == "--" => Some(alias),
        _ => None,
    }
}

/// Loads what the kernel asks for. That nothing has the alias is usual, and said only by the exit
/// status.
pub(crate) fn main(arguments: &[String]) -> ExitCode {
    let Some(alias) = asked(arguments) else { return ExitCode::FAILURE };
    match probe(alias) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // The kernel limits the rate of what it is told.
            if let Ok(mut log) = File::options().write(true).open("/dev/kmsg") {
                let _ = log.write_all(format!("<4>bulkhead-agent: {error}\n").as_bytes());
            }
            ExitCode::FAILURE
        }
    }
}

/// Returns whether there was something to load.
fn probe(alias: &str) -> Result<bool, ModprobeError> {
    if alias.len() > ALIAS_MAX {
        return Ok(false);
    }
    let path = Path::new(SHARE_DIR).join(MODULES_FILE);
    let file = File::open(path).map_err(ModprobeError::Read)?;
    let index = Index::read(&file)?;
    let notes = fs::read(NOTES).map_err(ModprobeError::Read)?;
    if !is_of(&notes, index.line("kernel").unwrap_or_default()) {
        return Err(ModprobeError::OtherKernel);
    }
    let Some(names) = index.wanted(alias) else { return Ok(false) };
    let listed = fs::read_to_string("/proc/modules").map_err(ModprobeError::Read)?;
    let loaded: HashSet<&str> =
        listed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    for name in names.split(' ').filter(|name| !loaded.contains(name)) {
        let (offset, size) = index.place(name)?;
        let mut content = vec![0; size];
        file.read_exact_at(&mut content, offset).map_err(ModprobeError::Read)?;
        load(&content).map_err(|error| ModprobeError::Load(name.to_owned(), error))?;
    }
    Ok(true)
}

/// The index, and where the modules begin.
struct Index {
    text: String,
    end: u64,
}

impl Index {
    fn read(file: &File) -> Result<Self, ModprobeError> {
        let mut first = [0; FIRST_LINE];
        file.read_exact_at(&mut first, 0).map_err(ModprobeError::Read)?;
        let size = str::from_utf8(&first).ok().and_then(|line| line.strip_prefix(FORMAT));
        let size = size.and_then(|rest| rest.trim().parse::<usize>().ok());
        let size = size.filter(|size| (FIRST_LINE..=INDEX_MAX).contains(size));
        let size = size.ok_or(ModprobeError::Format("no size of an index"))?;
        let mut text = vec![0; size];
        file.read_exact_at(&mut text, 0).map_err(ModprobeError::Read)?;
        let text = String::from_utf8(text).map_err(|_| ModprobeError::Format("not text"))?;
        Ok(Self { text, end: size as u64 })
    }

    /// What follows this word on the first line that begins with it.
    fn line(&self, word: &'static str) -> Option<&str> {
        self.lines(word).next()
    }

    /// The rest of each line that begins with this word.
    fn lines(&self, word: &'static str) -> impl Iterator<Item = &str> {
        self.text.lines().filter_map(move |line| line.strip_prefix(word)?.strip_prefix(' '))
    }

    /// The names of the modules that have an alias, in the order in which they are loaded.
    fn wanted(&self, alias: &str) -> Option<&str> {
        let alias = alias.replace('-', "_");
        self.lines("alias").find_map(|line| {
            let (pattern, names) = line.split_once(' ')?;
            let fits = match pattern.strip_suffix('*') {
                Some(start) => alias.starts_with(start),
                None => alias == pattern,
            };
            fits.then_some(names)
        })
    }

    /// Where a module is in the file, and its size.
    fn place(&self, name: &str) -> Result<(u64, usize), ModprobeError> {
        let of = |line: &str| {
            let numbers = line.strip_prefix(name)?.strip_prefix(' ')?;
            let (offset, size) = numbers.split_once(' ')?;
            Some((offset.parse::<u64>().ok()?, size.parse::<usize>().ok()?))
        };
        let (offset, size) =
            self.lines("module").find_map(of).ok_or(ModprobeError::Format("no such module"))?;
        let offset = offset.checked_add(self.end).filter(|_| size <= MODULE_MAX);
        Ok((offset.ok_or(ModprobeError::Format("a module is too large"))?, size))
    }
}

/// Whether a build id in hexadecimal digits is in the notes of a kernel.
fn is_of(notes: &[u8], build_id: &str) -> bool {
    let digits = build_id
        .as_bytes()
        .chunks(2)
        .map(|pair| str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok()));
    match digits.collect::<Option<Vec<u8>>>() {
        Some(id) if id.len() >= 8 => notes.windows(id.len()).any(|window| window == id),
        _ => false,
    }
}

/// Loads one module. That another process loaded it meanwhile is not an error.
fn load(module: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as it is told, and the terminated parameters; both
    // outlive the call.
    let loaded = unsafe {
        libc::syscall(libc::SYS_init_module, module.as_ptr(), module.len(), c"".as_ptr())
    };
    let error = io::Error::last_os_error();
    match loaded {
        0 => Ok(()),
        _ if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(lines: &str) -> Index {
        let text = format!("{FORMAT} 0\n{lines}");
        Index { end: 1000, text }
    }

    #[test]
    fn a_process_with_a_program_is_no_kernel_thread() {
        assert!(!is_kernel_thread(rustix::process::getpid()));
        assert!(!is_asked(&["create".to_owned(), "c".to_owned()]));
    }

    #[test]
    fn only_the_kernels_own_arguments_are_taken() {
        let alias = |words: &[&str]| {
            let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
            asked(&words).map(str::to_owned)
        };
        assert_eq!(alias(&["-q", "--", "fs-xfs"]).as_deref(), Some("fs-xfs"));
        for other in [
            &["fs-xfs"][..],
            &["-q", "fs-xfs"],
            &["-q", "--"],
            &["-q", "--", "fs-xfs", "x"],
            &["-r", "--", "fs-xfs"],
            &[],
        ] {
            assert_eq!(alias(other), None, "{other:?}");
        }
    }

    #[test]
    fn an_alias_is_only_compared() {
        let index = index(
            "kernel abcd\nmodule xfs 10 7\nmodule ppp_generic 17 5\nalias char_major_108_* slhc \
             ppp_generic\nalias fs_xfs xfs\nalias xfs xfs\n",
        );
        assert_eq!(index.wanted("fs-xfs"), Some("xfs"));
        assert_eq!(index.wanted("xfs"), Some("xfs"));
        assert_eq!(index.wanted("char-major-108-0"), Some("slhc ppp_generic"));
        for none in ["", "x", "fs-xf", "fs-xfs2", "*", "fs-*", "../xfs", "xfs xfs", "fs-xfs\nalias"]
        {
            assert_eq!(index.wanted(none), None, "{none}");
        }
        assert_eq!(index.place("xfs").unwrap(), (1010, 7));
        assert!(index.place("xf").is_err());
        assert_eq!(index.line("kernel"), Some("abcd"));
    }

    #[test]
    fn a_file_of_another_kind_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let read = |content: &str| {
            let path = directory.path().join("modules");
            fs::write(&path, content).unwrap();
            Index::read(&File::open(path).unwrap()).map(|index| index.text)
        };
        let good = format!("{:<31}\nkernel 00\n", format!("{FORMAT} 42"));
        assert_eq!(read(&good).unwrap(), good);
        for (wrong, why) in [
            (good.replace(" 42", " 43"), "failed to fill"),
            (good.replace(" 42", " 31"), "no size"),
            (good.replace(" 42", " -1"), "no size"),
            (good.replace("modules 1", "modules 2"), "no size"),
            (format!("{:<31}\n", format!("{FORMAT} 99999999")), "no size"),
            (String::new(), "failed to fill"),
        ] {
            let error = read(&wrong).unwrap_err().to_string();
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_kernel_is_known_by_its_build_id() {
        let notes = b"\x04\0\0\0\x08\0\0\0\x03\0\0\0GNU\0\x01\x23\x45\x67\x89\xab\xcd\xef";
        assert!(is_of(notes, "0123456789abcdef"));
        for other in ["0123456789abcdee", "", "01", "0123456789abcdeg", "0123456789abcde"] {
            assert!(!is_of(notes, other), "{other}");
        }
    }
}
