//! Packs the modules of a kernel into one file, which the guest's agent loads them from.
//!
//! It is one file, so that a pod that was started from it keeps it when another is installed. The
//! file begins with an index, lines of text:
//!
//! ```text
//! bulkhead-modules 1 INDEX-SIZE
//! kernel BUILD-ID                        the kernel that they were built for
//! module NAME OFFSET SIZE                relative to the end of the index
//! alias PATTERN NAME NAME …              what to load, in this order
//! ```
//!
//! A pattern is what the kernel asks modprobe for, with `-` written as `_`, and may end in `*`. A
//! module's own name is one of its aliases. Everything is sorted, so the same modules give the same
//! bytes.
//!
//! The kernel's build writes what modprobe needs into the section `.modinfo` of each module:
//! strings `key=value`, each with its NUL.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::elf;
use crate::source::hex;

/// The length of the first line, which is padded with blanks.
const FIRST_LINE: usize = 32;
/// The largest index: the agent reads it as a whole.
const MAX_INDEX: usize = 1 << 20;
/// Aliases of buses and processors: udev asks for them, and no pod has one.
const OF_HARDWARE: [&str; 8] = ["acpi", "cpu:", "of:", "pci:", "usb:", "virtio:", "dmi", "scsi:"];

/// One module.
#[derive(Debug)]
struct Module {
    content: Vec<u8>,
    aliases: BTreeSet<String>,
    depends: Vec<String>,
}

/// Packs the modules of a build directory in which `make vmlinux modules` was run.
///
/// # Errors
/// When a file of the build is missing or malformed, or a module needs one that was not built.
pub fn pack(build: &Path) -> Result<Vec<u8>> {
    let kernel = fs::read(build.join("vmlinux")).context("read the linked kernel")?;
    let build_id = build_id(&kernel).context("build id of the kernel")?;
    let order = fs::read_to_string(build.join("modules.order")).context("list of modules")?;
    let mut modules = BTreeMap::new();
    for line in order.lines() {
        let path = build.join(line).with_extension("ko");
        let named = || path.display().to_string();
        let content = fs::read(&path).with_context(named)?;
        let stem = path.file_stem().and_then(|stem| stem.to_str()).with_context(named)?;
        let module = read(stem, content).with_context(named)?;
        ensure!(modules.insert(normal(stem), module).is_none(), "two modules are named {stem}");
    }
    assemble(&hex(build_id), &modules)
}

/// Reads what a module says about itself.
fn read(name: &str, content: Vec<u8>) -> Result<Module> {
    let info = elf::section(&content, ".modinfo")?.context("no section .modinfo")?;
    let mut aliases = BTreeSet::from([normal(name)]);
    let mut depends = Vec::new();
    for entry in info.split(|byte| *byte == 0).filter(|entry| !entry.is_empty()) {
        let entry = str::from_utf8(entry).context(".modinfo is not text")?;
        match entry.split_once('=') {
            Some(("alias", alias)) if is_asked_for(alias) => {
                aliases.insert(normal(alias));
            }
            Some(("depends", names)) => {
                depends.extend(names.split(',').filter(|name| !name.is_empty()).map(normal));
            }
            _ => {}
        }
    }
    Ok(Module { content, aliases, depends })
}

/// Whether the kernel may ask for an alias: not those of hardware, nor with a `*` elsewhere than at
/// the end.
fn is_asked_for(alias: &str) -> bool {
    let inner = alias.strip_suffix('*').unwrap_or(alias);
    let plain = inner.bytes().all(|byte| byte.is_ascii_graphic() && !b"*?[]".contains(&byte));
    plain && !inner.is_empty() && !OF_HARDWARE.iter().any(|bus| alias.starts_with(bus))
}

/// The kernel's names of modules have `_` where file names may have `-`.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The index and the modules behind it.
fn assemble(build_id: &str, modules: &BTreeMap<String, Module>) -> Result<Vec<u8>> {
    let mut lines = format!("kernel {build_id}\n");
    let mut offset = 0;
    for (name, module) in modules {
        writeln!(lines, "module {name} {offset} {}", module.content.len())?;
        offset += module.content.len();
    }
    // More than one module may have an alias; modprobe would load them all.
    let mut wanted: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, module) in modules {
        for alias in &module.aliases {
            order(modules, name, wanted.entry(alias).or_default())?;
        }
    }
    for (alias, names) in wanted {
        writeln!(lines, "alias {alias} {}", names.join(" "))?;
    }
    let size = FIRST_LINE + lines.len();
    ensure!(size <= MAX_INDEX, "the index of the modules has {size} bytes");
    let first = format!("bulkhead-modules 1 {size}");
    let mut archive = format!("{first:<width$}\n{lines}", width = FIRST_LINE - 1).into_bytes();
    modules.values().for_each(|module| archive.extend_from_slice(&module.content));
    Ok(archive)
}

/// Appends what `name` needs and then itself, each once.
fn order<'a>(
    modules: &'a BTreeMap<String, Module>,
    name: &str,
    order_so_far: &mut Vec<&'a str>,
) -> Result<()> {
    let (name, module) =
        modules.get_key_value(name).with_context(|| format!("no module {name}"))?;
    if order_so_far.contains(&name.as_str()) {
        return Ok(());
    }
    for needed in &module.depends {
        order(modules, needed, order_so_far).with_context(|| format!("needed by {name}"))?;
    }
    order_so_far.push(name);
    Ok(())
}

/// The build id that the linker gave a kernel: the note "GNU" of type 3 in its section `.notes`.
/// Spec: ELF, "Note Section".
fn build_id(kernel: &[u8]) -> Result<&[u8]> {
    const GNU_BUILD_ID: u32 = 3;
    let mut notes = elf::section(kernel, ".notes")?.context("no section .notes")?;
    while let Some((header, rest)) = notes.split_at_checked(12) {
        let word = |at: usize| header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        let [Some(name), Some(size), Some(kind)] = [0, 4, 8].map(word) else { break };
        let (name, size) = (u32::from_le_bytes(name) as usize, u32::from_le_bytes(size) as usize);
        let start = name.next_multiple_of(4);
        let content = rest.get(start..start + size).context("a note is cut short")?;
        if rest.starts_with(b"GNU\0") && u32::from_le_bytes(kind) == GNU_BUILD_ID {
            return Ok(content);
        }
        notes = rest.get(start + size.next_multiple_of(4)..).unwrap_or_default();
    }
    anyhow::bail!("no note with a build id")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(content: &str, aliases: &[&str], depends: &[&str]) -> Module {
        let owned = |names: &[&str]| names.iter().map(|name| normal(name)).collect::<Vec<_>>();
        Module {
            content: content.into(),
            aliases: owned(aliases).into_iter().collect(),
            depends: owned(depends),
        }
    }

    #[test]
    fn an_alias_lists_what_to_load_in_order() {
        let modules = BTreeMap::from([
            ("fat".to_owned(), module("FAT", &["fat"], &[])),
            ("nls_x".to_owned(), module("NLSX", &["nls_x"], &["fat"])),
            ("vfat".to_owned(), module("V", &["vfat", "fs-vfat"], &["nls_x", "fat"])),
            ("other".to_owned(), module("O", &["other", "fs-vfat"], &[])),
        ]);
        let archive = assemble("abcd", &modules).unwrap();
        let size = archive.len() - "FATNLSXOV".len();
        let (index, content) = archive.split_at(size);
        let index = str::from_utf8(index).unwrap();
        let (first, lines) = index.split_once('\n').unwrap();
        assert_eq!(first.trim_end(), format!("bulkhead-modules 1 {size}"));
        assert_eq!(
            lines,
            "kernel abcd\nmodule fat 0 3\nmodule nls_x 3 4\nmodule other 7 1\nmodule vfat 8 1\n\
             alias fat fat\nalias fs_vfat other fat nls_x vfat\nalias nls_x fat nls_x\n\
             alias other other\nalias vfat fat nls_x vfat\n"
        );
        assert_eq!(content, b"FATNLSXOV");
    }

    #[test]
    fn a_module_that_needs_one_that_is_not_there_is_named() {
        let modules = BTreeMap::from([("vfat".to_owned(), module("V", &["vfat"], &["fat"]))]);
        let error = format!("{:#}", assemble("abcd", &modules).unwrap_err());
        assert_eq!(error, "needed by vfat: no module fat");
    }

    #[test]
    fn only_what_the_kernel_asks_for_is_an_alias() {
        for alias in ["fs-xfs", "char-major-108-*", "net-pf-2-proto-132-type-1", "crypto-aes"] {
            assert!(is_asked_for(alias), "{alias}");
        }
        for alias in ["cpu:type:x86,ven*fam*", "pci:v0*", "*", "a*b", "a b", "virtio:d00000009v*"] {
            assert!(!is_asked_for(alias), "{alias}");
        }
    }
}
