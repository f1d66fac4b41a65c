//! Policies as administrators write them, good and bad.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use super::keys::KEYS;
use super::*;

const FILE: &str = "/etc/bulkhead/config.toml";
const EXAMPLE: &str = include_str!("../../../docs/config.toml");
const OPERATIONS: &str = include_str!("../../../docs/OPERATIONS.md");

fn in_force(name: &RuntimeName, text: &str) -> Result<InForce, PolicyError> {
    InForce::of(name, Path::new(FILE), Some(text), |_| None)
}

fn bulkhead() -> RuntimeName {
    RuntimeName::called(Some("/usr/bin/bulkhead"))
}

fn mistake(text: &str) -> String {
    in_force(&bulkhead(), text).unwrap_err().to_string()
}

fn origin(made: &InForce, key: &str) -> Origin {
    made.values().find(|(name, ..)| *name == key).unwrap().2
}

#[test]
fn without_a_file_everything_is_a_default() {
    let made = InForce::of(&bulkhead(), Path::new(FILE), None, |_| None).unwrap();
    assert_eq!(made.policy, Policy::default());
    assert!(!made.found && made.values().all(|(.., origin)| origin == Origin::Default));
}

#[test]
fn the_example_has_every_key_with_its_default() {
    let made = in_force(&bulkhead(), EXAMPLE).unwrap();
    assert_eq!(made.policy, Policy::default());
    for (key, _, origin) in made.values() {
        assert!(matches!(origin, Origin::Line(_)), "{key} is not in docs/config.toml");
    }
    let strict = in_force(&RuntimeName::chosen("bulkhead-strict"), EXAMPLE).unwrap();
    assert_eq!(strict.policy.sockets.host, HostSocketRule::Refuse);
}

#[test]
fn the_table_of_all_keys_is_that_of_the_code() {
    let defaults = Policy::default();
    let rows = KEYS.iter().map(|key| {
        let default = (key.show)(&defaults);
        let right = key.right.replace('"', "`").replace("true or false", "`true` or `false`");
        format!("| `{}` | `{default}` | {right} |", key.name)
    });
    let rows: Vec<_> = rows.collect();
    for row in &rows {
        assert!(OPERATIONS.contains(row.as_str()), "docs/OPERATIONS.md has no row {row}");
    }
    let table = OPERATIONS.split("| key | default |").nth(1).unwrap().split("\n\n").next().unwrap();
    assert_eq!(table.lines().count() - 2, rows.len(), "{table}");
}

#[test]
fn what_is_shown_is_read_as_the_same() {
    let text = "size.memory_start = \"1GiB\"\nsize.memory_max = \"1536MiB\"\n\
                size.processors_max = 0x10\nnetwork.vhost = false\nsockets.host = \"refuse\"\n\
                guest.kernel = '/a \"b\\c'\nguest.modules = \"/m\"\nguest.initramfs = \"/i\"\nguest.boot_timeout = 60\n\
                log.level = \"info\"\nlog.supervisor_max = \"4MiB\"";
    let made = in_force(&bulkhead(), text).unwrap();
    assert!(made.values().zip(1..).all(|((.., origin), line)| origin == Origin::Line(line)));
    let shown: Vec<_> = made.values().map(|(key, value, _)| format!("{key} = {value}")).collect();
    assert_eq!(in_force(&bulkhead(), &shown.join("\n")).unwrap().policy, made.policy);
    assert_eq!(made.policy.size.memory_start_mib, 1024);
    assert_eq!(made.policy.size.processors_max, 16);
    assert_eq!(made.policy.guest.kernel, Path::new("/a \"b\\c"));
}

#[test]
fn a_section_of_the_runtimes_name_comes_after_what_is_for_all() {
    let text = "[size]\nmemory_max = \"2GiB\"\nprocessors_max = 4\n\n\
                [runtime.bulkhead-strict]\nsize.memory_max = \"512MiB\"\n\n\
                [runtime.other.size]\nprocessors_max = 1\n";
    let strict = RuntimeName::called(Some("/usr/bin/bulkhead-strict"));
    let made = in_force(&strict, text).unwrap();
    assert_eq!(made.policy.size.memory_max_mib, Some(512));
    assert_eq!(made.policy.size.processors_max, 4);
    assert_eq!(origin(&made, "size.memory_max"), Origin::Line(6));
    assert_eq!(origin(&made, "size.processors_max"), Origin::Line(3));
    assert_eq!(origin(&made, "log.level"), Origin::Default);
    assert_eq!(in_force(&bulkhead(), text).unwrap().policy.size.memory_max_mib, Some(2048));
}

#[test]
fn a_variant_without_its_section_is_refused() {
    let text = "[runtime.bulkhead-strict]\n[runtime.b]";
    let names = [RuntimeName::called(Some("/x/bulkhead-strct")), RuntimeName::chosen("runc")];
    for name in names {
        let words = in_force(&name, text).unwrap_err().to_string();
        let expected = format!(
            "{FILE} has no section [runtime.{}] for the runtime that is called so (it has those of \
             b, bulkhead-strict); write one, which may be empty, or call it by another name",
            name.as_str()
        );
        assert_eq!(words, expected);
    }
    // A link that takes the place of another runtime.
    in_force(&RuntimeName::called(Some("/usr/bin/runc")), text).unwrap();
    in_force(&RuntimeName::called(None::<&Path>), text).unwrap();
    let missing = InForce::of(&RuntimeName::chosen("b"), Path::new(FILE), None, |_| None);
    assert!(missing.unwrap_err().to_string().contains("[runtime.b] for the runtime"));
}

#[test]
fn a_mistake_is_named_with_its_place_and_what_would_be_right() {
    for (text, words) in [
        (
            "[size]\nmemory_max = 512\n",
            "2:14: size.memory_max cannot be 512; write a size such as \"2GiB\", at least \
             \"64MiB\", or \"host\"",
        ),
        (
            "[size]\n  memry_max = \"1GiB\"\n",
            "2:3: unknown key \"memry_max\" in [size]; there are memory_start, memory_max, \
             processors_max",
        ),
        (
            "[sizes]\n",
            "1:2: unknown section \"sizes\"; there are size, network, sockets, guest, log and \
             runtime.NAME",
        ),
        ("[runtime.x]\nlevel = \"info\"", "2:1: unknown section \"level\""),
        ("[runtime.x.log]\nlevel = \"all\"", "2:9: log.level cannot be \"all\"; write \"error\""),
        ("log = \"info\"", "1:7: \"log\" is a section, not a key"),
        ("runtime = 1", "1:11: \"runtime\" is a section, not a key"),
        ("runtime.x = 1", "1:13: \"x\" is a section, not a key"),
        ("[size\n", "1:6: this is not TOML: "),
        ("[log]\nlevel = \"info\"\nlevel = \"info\"", "3:1: this is not TOML: duplicate key"),
    ] {
        let found = mistake(text);
        assert!(found.starts_with(&format!("{FILE}:{words}")), "{text}: {found}");
    }
}

#[test]
fn no_key_takes_what_it_has_no_meaning_for() {
    for (key, wrong) in [
        ("size.memory_start", ["\"host\"", "\"63MiB\"", "\"1g\"", "true", "\"+64MiB\""]),
        ("size.memory_max", ["\"0MiB\"", "-1", "\"5000000000GiB\"", "\"MiB\"", "[]"]),
        ("size.processors_max", ["0", "65", "-1", "2.5", "true"]),
        ("network.vhost", ["0", "\"no\"", "1", "\"true\"", "{}"]),
        ("sockets.host", ["true", "\"deny\"", "\"\"", "1", "[\"allow\"]"]),
        ("guest.kernel", ["\"\"", "1", "true", "\"a\\u0000b\"", "[]"]),
        ("guest.modules", ["\"\"", "1", "true", "\"a\\u0000b\"", "[]"]),
        ("guest.initramfs", ["\"\"", "1", "true", "\"a\\u0000b\"", "[]"]),
        ("guest.boot_timeout", ["0", "3601", "-1", "\"soon\"", "true"]),
        ("log.level", ["\"warn\"", "1", "true", "\"Error\"", "[]"]),
        ("log.supervisor_max", ["\"0MiB\"", "1", "true", "\"host\"", "\"1KiB\""]),
    ] {
        assert!(KEYS.iter().any(|it| it.name == key));
        for value in wrong {
            let words = mistake(&format!("{key} = {value}"));
            assert!(words.contains(&format!("{key} cannot be {value}; write ")), "{words}");
        }
    }
}

#[test]
fn the_environment_is_last_and_is_checked() {
    let of = |name: &'static str, value: &'static str| {
        let variable = move |it: &str| (it == name).then(|| value.into());
        InForce::of(&bulkhead(), Path::new(FILE), Some("network.vhost = true"), variable)
    };
    let made = of("BULKHEAD_VHOST_NET", "0").unwrap();
    assert!(!made.policy.network.vhost);
    assert_eq!(origin(&made, "network.vhost"), Origin::Variable("BULKHEAD_VHOST_NET"));
    let made = of("BULKHEAD_BOOT_TIMEOUT", "110").unwrap();
    assert_eq!(made.policy.guest.boot_timeout, Duration::from_secs(110));
    let words = of("BULKHEAD_BOOT_TIMEOUT", "long").unwrap_err().to_string();
    let expected = "BULKHEAD_BOOT_TIMEOUT=\"long\" means nothing; write a number of seconds from 1 \
                    to 3600";
    assert_eq!(words, expected);
}

/// A directory below one like `/tmp`, with a policy in it.
fn directory() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.toml");
    fs::write(&file, "log.level = \"info\"").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    (directory, file)
}

fn me() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[test]
fn a_file_is_read_only_where_nobody_else_can_write() {
    let (directory, file) = directory();
    assert_eq!(trusted::read(&file, me()).unwrap().as_deref(), Some("log.level = \"info\""));
    assert_eq!(trusted::read(&directory.path().join("none"), me()).unwrap(), None);
    let refused = |path: &Path, mode| {
        let before = fs::metadata(path).unwrap().permissions();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let words = trusted::read(&file, me()).unwrap_err().to_string();
        fs::set_permissions(path, before).unwrap();
        words
    };
    let (name, parent) = (file.display(), directory.path().display());
    let expected = format!(
        "cannot trust {name}: others than root may write to {name} (mode 0666); take that away \
         with \"chmod go-w {name}\""
    );
    assert_eq!(refused(&file, 0o666), expected);
    assert!(refused(&file, 0o664).contains("(mode 0664)"));
    let words = refused(directory.path(), 0o777);
    assert!(words.contains(&format!("may write to {parent} (mode 0777)")), "{words}");
    // Another user's file, as far as this test can be that user.
    if me() == 0 {
        chown(&file, Some(1000), None).unwrap();
        let words = trusted::read(&file, 0).unwrap_err().to_string();
        let expected = format!("{name} belongs to user 1000; give it to root with \"chown root");
        assert!(words.contains(&expected), "{words}");
    }
}

#[test]
fn a_link_is_trusted_as_its_way_and_its_end_are() {
    let (near, link) = directory();
    let (far, file) = directory();
    fs::remove_file(&link).unwrap();
    symlink(&file, &link).unwrap();
    assert!(trusted::read(&link, me()).unwrap().is_some());
    // By another link, a relative one.
    symlink("config.toml", near.path().join("alias")).unwrap();
    symlink("../..", near.path().join("up")).unwrap();
    assert!(trusted::read(&near.path().join("alias"), me()).unwrap().is_some());
    fs::set_permissions(far.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let words = trusted::read(&near.path().join("alias"), me()).unwrap_err().to_string();
    assert!(words.contains(&format!("may write to {}", far.path().display())), "{words}");
    symlink("self", near.path().join("self")).unwrap();
    let words = trusted::read(&near.path().join("self"), me()).unwrap_err().to_string();
    assert!(words.starts_with("cannot read "), "{words}");
    let words = trusted::read(near.path(), me()).unwrap_err().to_string();
    assert!(words.ends_with("is not a regular file"), "{words}");
}

#[test]
fn a_file_that_is_no_policy_is_not_read_to_its_end() {
    let (_directory, file) = directory();
    fs::write(&file, " ".repeat(usize::try_from(trusted::BYTES_MAX).unwrap() + 1)).unwrap();
    let words = trusted::read(&file, me()).unwrap_err().to_string();
    assert!(words.ends_with("is larger than 1048576 bytes; a policy needs less"), "{words}");
}
