//! The description of a format, as the host's kernel shows it.

use bulkhead_protocol::agent::format::Files;
use bulkhead_protocol::agent::{Format, Magic};

/// The bytes of a file that the kernel compares.
const COMPARED: usize = 256;

/// A format of the host.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// All but the file of the interpreter.
    pub(super) format: Format,
    /// The kernel has opened the interpreter when the format was registered (the flag F).
    pub(super) keeps_file: bool,
}

impl Entry {
    /// Reads the description of the format `name`. A name, a path and an extension may contain
    /// anything, line feeds too.
    pub(super) fn parse(name: &[u8], text: &[u8]) -> Option<Self> {
        let (state, rest) = split(text.strip_suffix(b"\n")?, b"\ninterpreter ")?;
        let disabled = match state {
            b"enabled" => false,
            b"disabled" => true,
            _ => return None,
        };
        let (interpreter, rest) = split_last(rest, b"\nflags: ")?;
        let (flags, rest) = split(rest, b"\n")?;
        let flags = str::from_utf8(flags).ok()?;
        let known = flags.chars().all(|flag| "POCF".contains(flag));
        let files = match rest.strip_prefix(b"extension .") {
            Some(extension) => Files::Extension(extension.to_vec()),
            None => Files::Magic(magic(str::from_utf8(rest).ok()?)?),
        };
        let format = Format {
            name: name.to_vec(),
            disabled,
            interpreter: interpreter.to_vec(),
            flags: flags.replace('F', ""),
            files: Some(files),
            file: None,
        };
        known.then_some(Self { format, keeps_file: flags.contains('F') })
    }

    /// The content and the extension of a file that the format is for.
    pub(super) fn sample(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut content = vec![0; COMPARED];
        match self.format.files.as_ref()? {
            Files::Extension(extension) => return Some((content, extension.clone())),
            Files::Magic(Magic { offset, bytes, .. }) => {
                let end = usize::try_from(*offset).ok()?.checked_add(bytes.len())?;
                content.get_mut(end - bytes.len()..end)?.copy_from_slice(bytes);
            }
        }
        Some((content, Vec::new()))
    }

    /// Whether the kernel takes a file for one of this format.
    pub(super) fn fits(&self, content: &[u8], extension: &[u8]) -> bool {
        if self.format.disabled {
            return false;
        }
        match &self.format.files {
            Some(Files::Extension(own)) => own == extension,
            Some(Files::Magic(Magic { offset, bytes, mask })) => {
                let from = usize::try_from(*offset).ok().and_then(|offset| content.get(offset..));
                let Some(there) = from.and_then(|from| from.get(..bytes.len())) else {
                    return false;
                };
                let counts = mask.iter().copied().chain(std::iter::repeat(0xff));
                there.iter().zip(bytes).zip(counts).all(|((a, b), mask)| (a ^ b) & mask == 0)
            }
            None => false,
        }
    }
}

/// Reads the lines on a magic.
fn magic(text: &str) -> Option<Magic> {
    let (offset, rest) = text.strip_prefix("offset ")?.split_once('\n')?;
    let rest = rest.strip_prefix("magic ")?;
    let (bytes, mask) = rest.split_once("\nmask ").unwrap_or((rest, ""));
    let (bytes, mask) = (from_hex(bytes)?, from_hex(mask)?);
    let right = !bytes.is_empty() && (mask.is_empty() || mask.len() == bytes.len());
    right.then_some(Magic { offset: offset.parse().ok()?, bytes, mask })
}

fn from_hex(digits: &str) -> Option<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2).map(|pair| {
        let digits = str::from_utf8(pair).ok().filter(|pair| pair.len() == 2)?;
        u8::from_str_radix(digits, 16).ok()
    });
    pairs.collect()
}

/// What is before and after the first place where `between` is.
fn split<'a>(bytes: &'a [u8], between: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let at = bytes.windows(between.len()).position(|window| window == between)?;
    Some((&bytes[..at], &bytes[at + between.len()..]))
}

/// What is before and after the last place where `between` is.
fn split_last<'a>(bytes: &'a [u8], between: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let at = bytes.windows(between.len()).rposition(|window| window == between)?;
    Some((&bytes[..at], &bytes[at + between.len()..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<Entry> {
        Entry::parse(b"name", text.as_bytes())
    }

    fn files(entry: &Entry) -> &Files {
        entry.format.files.as_ref().unwrap()
    }

    #[test]
    fn descriptions_of_formats_that_people_have_are_read() {
        let qemu = "enabled\ninterpreter /usr/libexec/qemu-binfmt/aarch64-binfmt-P\nflags: POCF\n\
                    offset 0\nmagic 7f454c460201010000000000000000000200b700\n\
                    mask ffffffffffffff00fffffffffffffffffeffffff\n";
        let qemu = parse(qemu).unwrap();
        assert!(qemu.keeps_file && !qemu.format.disabled);
        assert_eq!(qemu.format.flags, "POC");
        assert_eq!(qemu.format.interpreter, b"/usr/libexec/qemu-binfmt/aarch64-binfmt-P");
        let Files::Magic(magic) = files(&qemu) else { panic!("{qemu:?}") };
        assert_eq!(magic.bytes, b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0");
        assert_eq!((magic.mask.len(), magic.mask[7]), (20, 0));

        let jar = "disabled\ninterpreter /usr/bin/jexec\nflags: \noffset 0\nmagic 504b0304\n";
        let jar = parse(jar).unwrap();
        assert!(jar.format.disabled && !jar.keeps_file && jar.format.flags.is_empty());
        let magic = Magic { offset: 0, bytes: b"PK\x03\x04".to_vec(), mask: Vec::new() };
        assert_eq!(files(&jar), &Files::Magic(magic));

        let odd = parse("enabled\ninterpreter /a b\nflags: x\nflags: \nextension .my.exe\n");
        let odd = odd.unwrap();
        assert_eq!(odd.format.interpreter, b"/a b\nflags: x");
        assert_eq!(files(&odd), &Files::Extension(b"my.exe".to_vec()));
    }

    #[test]
    fn what_is_no_description_is_refused() {
        for text in [
            "",
            "\n",
            "enabled\n",
            "asleep\ninterpreter /x\nflags: \nextension .x\n",
            "enabled\ninterpreter /x\nflags: Z\nextension .x\n",
            "enabled\ninterpreter /x\nflags: \nmagic 00\n",
            "enabled\ninterpreter /x\nflags: \noffset -1\nmagic 00\n",
            "enabled\ninterpreter /x\nflags: \noffset 0\nmagic 0\n",
            "enabled\ninterpreter /x\nflags: \noffset 0\nmagic \n",
            "enabled\ninterpreter /x\nflags: \noffset 0\nmagic 00\nmask 0000\n",
            "enabled\ninterpreter /x\nflags: \noffset 0\nmagic 0\u{e9}0\n",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_sample_is_one_of_its_format() {
        let of = |rest: &str| parse(&format!("enabled\ninterpreter /x\nflags: \n{rest}")).unwrap();
        let masked = of("offset 2\nmagic 414200ff\nmask ffdf00ff\n");
        let (content, extension) = masked.sample().unwrap();
        assert_eq!(content.len(), COMPARED);
        assert!(masked.fits(&content, &extension));
        assert!(masked.fits(b"..AbX\xff", b""));
        for other in [&b"..AcX\xff"[..], b"..AbX", b"", b"AbX\xff"] {
            assert!(!masked.fits(other, b""), "{other:?}");
        }
        let plain = of("offset 252\nmagic 41424344\n");
        let (content, _) = plain.sample().unwrap();
        assert!(plain.fits(&content, b"") && !masked.fits(&content, b""));
        assert_eq!(of("offset 253\nmagic 41424344\n").sample(), None);
        let named = of("extension .x\n");
        assert_eq!(named.sample().unwrap().1, b"x");
        assert!(named.fits(b"", b"x") && !named.fits(b"", b"y"));
    }
}
