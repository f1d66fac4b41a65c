//! What is made of a descriptor that is asked for.

use std::io::{Read as _, Write as _};

use super::*;

fn descriptor(kind: Asked, flags: OFlags) -> Descriptor {
    Descriptor { kind: Some(kind), flags: flags.bits() }
}

#[tokio::test]
async fn each_kind_becomes_what_it_is_on_the_host() {
    let header = || vec![1; StreamHeader::LEN];
    let asked = [
        descriptor(Asked::Reading(header()), OFlags::RDONLY),
        descriptor(Asked::Writing(header()), OFlags::WRONLY | OFlags::NONBLOCK),
        descriptor(Asked::Socket(header()), OFlags::RDWR),
        descriptor(Asked::Device("/dev/zero".to_owned()), OFlags::RDONLY),
    ];
    let (relays, theirs) = prepare(&asked).unwrap();
    assert_eq!(relays.0.len(), 3);
    let modes = theirs.iter().map(|one| fcntl_getfl(one).unwrap() & KEPT);
    let expected =
        [OFlags::RDONLY, OFlags::WRONLY | OFlags::NONBLOCK, OFlags::RDWR, OFlags::RDONLY];
    assert_eq!(modes.collect::<Vec<_>>(), expected);
    let mut zero = [1];
    File::from(theirs.into_iter().last().unwrap()).read_exact(&mut zero).unwrap();
    assert_eq!(zero, [0]);
}

#[tokio::test]
async fn what_cannot_be_made_is_named_by_its_number() {
    let words = |asked: &[Descriptor]| prepare(asked).unwrap_err().to_string();
    let short = descriptor(Asked::Reading(vec![1]), OFlags::RDONLY);
    assert_eq!(words(&[short]), "descriptor 3 has a header of 1 bytes, not 16");
    let zero = || descriptor(Asked::Device("/dev/zero".to_owned()), OFlags::RDONLY);
    let none = Descriptor { kind: None, flags: 0 };
    assert_eq!(words(&[zero(), none]), "descriptor 4 has an unknown kind");
    let many: Vec<_> = (0..=DESCRIPTORS_MAX).map(|_| zero()).collect();
    assert_eq!(words(&many), "62 descriptors; a process gets 61 at most");
    for path in ["../up", "/etc/passwd", "a/../b"] {
        let file = SharedFile { path: path.to_owned(), offset: 0 };
        let file = descriptor(Asked::File(file), OFlags::RDONLY);
        assert_eq!(words(&[file]), "cannot make or open descriptor 3", "{path}");
    }
}

#[tokio::test]
async fn a_hang_up_is_not_the_end_of_one_direction() {
    let (ours, mut theirs) = StdStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let hang_up = HangUp::of(&UnixStream::from_std(ours).unwrap()).unwrap();
    theirs.write_all(b"x").unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    assert!(!hang_up.is_there());
    tokio::select! {
        biased;
        () = hang_up.comes() => panic!("only one direction has ended"),
        () = tokio::task::yield_now() => {}
    }
    drop(theirs);
    hang_up.comes().await;
    assert!(hang_up.is_there());
}
