//! Attributes: modes, owners, times, extended attributes, access lists.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Mode, StatxFlags, Timespec, Timestamps, XattrFlags, fstatfs, getxattr, lgetxattr,
    listxattr, removexattr, setxattr, statfs, statx, utimensat,
};
use rustix::io::Errno;

use crate::pod::{Pod, as_user};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

fn xattr(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; 1 << 16];
    let len = getxattr(path, name, value.as_mut_slice())?;
    value.truncate(len);
    Ok(value)
}

#[test]
fn special_modes_are_kept() {
    let pod = Pod::new();
    let file = pod.guest.join("file");
    fs::write(&file, b"").unwrap();
    for bits in [0o4755, 0o2755, 0o6711, 0o1777, 0o000, 0o644] {
        set_mode(&file, bits);
        assert_eq!(mode(&pod.host.join("file")), bits);
        assert_eq!(mode(&file), bits);
    }
}

#[test]
fn a_new_owner_and_a_foreign_writer_cost_the_set_id_bits() {
    let pod = Pod::new();
    let (file, host) = (pod.guest.join("file"), pod.host.join("file"));
    fs::write(&file, b"text").unwrap();
    set_mode(&file, 0o6777);
    chown(&file, Some(1000), Some(1000)).unwrap();
    assert_eq!(mode(&host), 0o777);
    assert_eq!(fs::metadata(&host).unwrap().uid(), 1000);
    for change in [
        &(|path: &Path| File::options().append(true).open(path).unwrap().write_all(b"x").unwrap())
            as &(dyn Fn(&Path) + Sync),
        &|path| File::options().write(true).open(path).unwrap().set_len(1).unwrap(),
        &|path| drop(File::options().write(true).truncate(true).open(path).unwrap()),
    ] {
        set_mode(&file, 0o6777);
        as_user(2000, 2000, &[], || change(&file));
        assert_eq!(mode(&host), 0o777);
        assert_eq!(mode(&file), 0o777);
    }
    set_mode(&file, 0o6777);
    fs::write(&file, b"by root").unwrap();
    assert_eq!(mode(&host), 0o6777, "root may keep them");
}

#[test]
fn times_are_set_to_the_nanosecond() {
    let pod = Pod::new();
    let (file, host) = (pod.guest.join("file"), pod.host.join("file"));
    fs::write(&file, b"").unwrap();
    let times = Timestamps {
        last_access: Timespec { tv_sec: 1_000_000, tv_nsec: 123_456_789 },
        last_modification: Timespec { tv_sec: -5, tv_nsec: 1 },
    };
    utimensat(CWD, &file, &times, AtFlags::empty()).unwrap();
    for path in [&file, &host] {
        let stat = fs::metadata(path).unwrap();
        assert_eq!((stat.atime(), stat.atime_nsec()), (1_000_000, 123_456_789));
        assert_eq!((stat.mtime(), stat.mtime_nsec()), (-5, 1));
    }
    // The times of the link itself, not of its target.
    std::os::unix::fs::symlink("file", pod.guest.join("link")).unwrap();
    utimensat(CWD, pod.guest.join("link"), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    let stat = fs::symlink_metadata(pod.host.join("link")).unwrap();
    assert_eq!((stat.mtime(), stat.mtime_nsec()), (-5, 1));
    chown_link(&pod.guest.join("link"));
    assert_eq!(fs::symlink_metadata(pod.host.join("link")).unwrap().uid(), 7);
    assert_eq!(fs::metadata(&host).unwrap().uid(), 0);
}

fn chown_link(path: &Path) {
    std::os::unix::fs::lchown(path, Some(7), None).unwrap();
}

#[test]
fn statx_has_the_time_of_birth() {
    let pod = Pod::new();
    fs::write(pod.guest.join("file"), b"").unwrap();
    let birth = |path: &Path| {
        let stat = statx(CWD, path, AtFlags::empty(), StatxFlags::ALL).unwrap();
        assert!(stat.stx_mask & StatxFlags::BTIME.bits() != 0);
        (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec)
    };
    assert_eq!(birth(&pod.guest.join("file")), birth(&pod.host.join("file")));
}

#[test]
fn file_system_statistics_are_those_of_the_host() {
    let pod = Pod::new();
    let (host, guest) = (statfs(&pod.host).unwrap(), statfs(&pod.guest).unwrap());
    assert_eq!(guest.f_blocks, host.f_blocks);
    assert_eq!((guest.f_bsize, guest.f_namelen), (host.f_bsize, host.f_namelen));
    let open = fstatfs(File::open(&pod.guest).unwrap()).unwrap();
    assert_eq!(open.f_files, host.f_files);
}

#[test]
fn extended_attributes_behave() {
    let pod = Pod::new();
    let (file, host) = (pod.guest.join("file"), pod.host.join("file"));
    fs::write(&file, b"").unwrap();
    let set = |name: &str, value: &[u8], flags| setxattr(&file, name, value, flags);
    set("user.one", b"1", XattrFlags::empty()).unwrap();
    set("user.large", &[7; 20_000], XattrFlags::CREATE).unwrap();
    assert_eq!(set("user.one", b"2", XattrFlags::CREATE), Err(Errno::EXIST));
    assert_eq!(set("user.none", b"2", XattrFlags::REPLACE), Err(Errno::NODATA));
    assert_eq!(xattr(&host, "user.large").unwrap(), [7; 20_000]);
    assert_eq!(xattr(&file, "user.one").unwrap(), b"1");
    assert_eq!(xattr(&file, "user.none"), Err(Errno::NODATA));
    assert_eq!(getxattr(&file, "user.large", &mut [0; 10][..]), Err(Errno::RANGE));
    assert_eq!(rustix::fs::getxattr_query(&file, "user.large").unwrap(), 20_000);
    let mut names = vec![0; 1000];
    let len = listxattr(&file, names.as_mut_slice()).unwrap();
    names.truncate(len);
    let mut names: Vec<_> =
        names.split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    assert_eq!(names, [&b"user.large"[..], b"user.one"]);
    removexattr(&file, "user.large").unwrap();
    assert_eq!(xattr(&host, "user.large"), Err(Errno::NODATA));
    // Attributes of directories, and of links, which have no user attributes.
    setxattr(&pod.guest, "user.directory", b"d", XattrFlags::empty()).unwrap();
    assert_eq!(xattr(&pod.host, "user.directory").unwrap(), b"d");
    std::os::unix::fs::symlink("file", pod.guest.join("link")).unwrap();
    let of_link = lgetxattr(pod.guest.join("link"), "user.one", &mut [0; 10][..]);
    assert!(matches!(of_link, Err(Errno::PERM | Errno::NODATA)), "{of_link:?}");
    // The host's kernel requires CAP_SYS_ADMIN for these, which the file server does not have. So
    // they have another name there, which the guest cannot use itself.
    set("trusted.overlay.x", b"1", XattrFlags::empty()).unwrap();
    assert_eq!(xattr(&file, "trusted.overlay.x").unwrap(), b"1");
    assert_eq!(xattr(&host, "user.bulkhead.trusted.overlay.x").unwrap(), b"1");
    let forged = set("user.bulkhead.trusted.overlay.x", b"2", XattrFlags::empty());
    assert_eq!(forged, Err(Errno::PERM));
}

#[test]
fn file_capabilities_are_kept_until_somebody_writes() {
    let pod = Pod::new();
    let (file, host) = (pod.guest.join("file"), pod.host.join("file"));
    fs::write(&file, b"program").unwrap();
    // Version 2, effective, CAP_NET_BIND_SERVICE, as `setcap` writes it.
    let mut value = [0_u8; 20];
    value[..4].copy_from_slice(&0x0200_0001_u32.to_le_bytes());
    value[4..8].copy_from_slice(&(1_u32 << 10).to_le_bytes());
    setxattr(&file, "security.capability", &value, XattrFlags::empty()).unwrap();
    assert_eq!(xattr(&host, "security.capability").unwrap(), value);
    assert_eq!(xattr(&file, "security.capability").unwrap(), value);
    fs::write(&file, b"another program").unwrap();
    assert_eq!(xattr(&host, "security.capability"), Err(Errno::NODATA));
}

/// An access list as it is stored: version 2, then tag, permissions, id.
fn access_list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

#[test]
fn access_lists_are_kept_and_obeyed() {
    const NONE: u32 = u32::MAX;
    let pod = Pod::new();
    let (directory, host) = (pod.guest.join("d"), pod.host.join("d"));
    fs::create_dir(&directory).unwrap();
    // Owner all, user 1000 all, group none, mask all, others none.
    let list =
        access_list(&[(1, 7, NONE), (2, 7, 1000), (4, 0, NONE), (16, 7, NONE), (32, 0, NONE)]);
    for name in ["system.posix_acl_access", "system.posix_acl_default"] {
        setxattr(&directory, name, &list, XattrFlags::empty()).unwrap();
        assert_eq!(xattr(&host, name).unwrap(), list);
    }
    as_user(1000, 1000, &[], || {
        rustix::process::umask(Mode::from_raw_mode(0o077));
        fs::write(directory.join("file"), b"").unwrap();
    });
    as_user(1001, 1001, &[], || assert!(fs::read_dir(&directory).is_err()));
    // The default list applies, not the umask.
    assert_eq!(mode(&host.join("file")), 0o660);
    assert!(xattr(&directory.join("file"), "system.posix_acl_access").is_ok());
}
