//! What descriptors are taken for.

use std::fs::File;
use std::io::Read as _;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use rustix::fs::{CWD, MemfdFlags, Mode, memfd_create, mkfifoat, open};

use super::*;

fn told(fd: impl AsFd) -> Result<Descriptor, String> {
    let number = fd.as_fd().as_raw_fd().to_string();
    describe(fd.as_fd()).map_err(|error| error.to_string().replacen(&number, "N", 1))
}

fn kind(fd: impl AsFd) -> DescriptorKind {
    told(fd).unwrap().kind
}

#[test]
fn what_reaches_into_a_machine_is_known() {
    let (reader, writer) = io::pipe().unwrap();
    assert_eq!((kind(&reader), kind(&writer)), (DescriptorKind::Reading, DescriptorKind::Writing));
    let (one, other) = UnixStream::pair().unwrap();
    assert_eq!(kind(&one), DescriptorKind::Socket);
    drop(other);
    assert_eq!(
        kind(&one),
        DescriptorKind::Socket,
        "one whose peer has gone has still an end to tell"
    );
    for path in ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"] {
        assert_eq!(kind(File::open(path).unwrap()), DescriptorKind::Device(path.to_owned()));
    }
}

#[test]
fn files_are_known_with_their_place_and_their_mode() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    fs::write(&path, "0123456789").unwrap();
    let mut file = File::open(&path).unwrap();
    file.read_exact(&mut [0; 4]).unwrap();
    assert_eq!(kind(&file), DescriptorKind::File { offset: 4, read_only: true });
    let file = File::options().append(true).open(&path).unwrap();
    let descriptor = told(&file).unwrap();
    assert_eq!(descriptor.kind, DescriptorKind::File { offset: 0, read_only: false });
    let flags = OFlags::from_bits_retain(descriptor.flags);
    assert!(flags.contains(OFlags::APPEND | OFlags::WRONLY), "{flags:?}");
    let directory = File::open(directory.path()).unwrap();
    assert_eq!(kind(&directory), DescriptorKind::Directory { read_only: true });
    let lookalike = path.with_file_name("file (deleted)");
    fs::write(&lookalike, "").unwrap();
    let lookalike = kind(File::open(lookalike).unwrap());
    assert_eq!(lookalike, DescriptorKind::File { offset: 0, read_only: true });
}

#[test]
fn what_stays_on_the_host_is_refused_by_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    mkfifoat(CWD, &fifo, Mode::RWXU).unwrap();
    let both = File::options().read(true).write(true).open(&fifo).unwrap();
    let path = open(directory.path(), OFlags::PATH, Mode::empty()).unwrap();
    let memory = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
    let network = TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let status = File::open("/proc/self/status").unwrap();
    let namespace = File::open("/proc/self/ns/net").unwrap();
    let deleted = tempfile::tempfile().unwrap();
    let table: [(BorrowedFd<'_>, &str); 12] = [
        (deleted.as_fd(), "a file without a name, which cannot be shared; keep its name"),
        (both.as_fd(), "a FIFO that is open for reading and writing, and"),
        (path.as_fd(), "open with O_PATH, which gives no access; open it"),
        (memory.as_fd(), "a memfd, which is memory of the host's; put"),
        (datagram.as_fd(), "a socket that is no stream, whose messages"),
        (udp.as_fd(), "a socket that is no stream, whose messages"),
        (listener.as_fd(), "a listening socket, which belongs to the host's network; listen in"),
        (network.as_fd(), "a listening socket, which belongs to the host's network; listen in"),
        (event.as_fd(), "anon_inode:[eventfd], which only the host's kernel knows; close it"),
        (epoll.as_fd(), "anon_inode:[eventpoll], which only the host's kernel knows; close it"),
        (status.as_fd(), "of the proc file system, which shows the host's kernel; use"),
        (namespace.as_fd(), "of the namespace file system, which shows the host's kernel"),
    ];
    for (fd, words) in table {
        let said = told(fd).unwrap_err();
        assert!(said.starts_with(&format!("descriptor N is {words}")), "{said}");
    }
}

#[test]
fn more_than_a_process_gets_and_what_is_not_open_are_named() {
    let words = |count| Preserved::take(count).unwrap_err().to_string();
    assert_eq!(words(62), "--preserve-fds 62: at most 61 descriptors are passed");
    assert_eq!(Preserved::take(0).unwrap().count(), 0);
    let closed = PreservedError::Closed { count: 2, number: 4 }.to_string();
    assert_eq!(closed, "--preserve-fds 2: descriptor 4 is not open; open it or pass fewer");
}
