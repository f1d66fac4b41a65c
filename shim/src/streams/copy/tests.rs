//! Copies between pipes, sockets and a container that the test plays.

use std::io::Write;

use rustix::pipe::fcntl_setpipe_size;

use super::*;

/// What a test waits for at most.
const PATIENCE: Duration = Duration::from_secs(10);

fn pair() -> (UnixStream, UnixStream) {
    let (one, other) = UnixStream::pair().unwrap();
    for end in [&one, &other] {
        end.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    (one, other)
}

/// Copies between a caller's descriptor and a stream.
fn copied(caller: impl Into<OwnedFd>, stream: UnixStream, ways: &[Way]) -> Copies {
    let ends = Arc::new(Ends { caller: caller.into(), stream, socket: ways.len() == 2 });
    let mut copies = Copies::new();
    for way in ways {
        copies.start(ends.clone(), *way).unwrap();
    }
    copies
}

/// A caller's socket that is relayed: its peer, and the container's side of the stream.
fn relayed() -> (UnixStream, UnixStream, Copies) {
    let ((peer, caller), (inside, stream)) = (pair(), pair());
    (peer, inside, copied(caller, stream, &[Way::In, Way::Out]))
}

/// A container whose output is passed on, and where it arrives.
fn drained() -> (UnixStream, io::PipeReader, Copies) {
    let ((reader, writer), (inside, stream)) = (io::pipe().unwrap(), pair());
    (inside, reader, copied(writer, stream, &[Way::Out]))
}

fn rest(mut of: &UnixStream) -> String {
    let mut text = String::new();
    of.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_socket_goes_both_ways_and_each_way_ends_by_itself() {
    let (mut peer, mut inside, copies) = relayed();
    peer.write_all(b"question").unwrap();
    peer.shutdown(Side::Write).unwrap();
    assert_eq!(rest(&inside), "question");
    inside.write_all(b"answer").unwrap();
    inside.shutdown(Side::Write).unwrap();
    assert_eq!(rest(&peer), "answer");
    copies.join();
}

#[test]
fn a_socket_that_is_closed_inside_is_closed_and_not_shut_down() {
    let ((peer, caller), (mut inside, stream)) = (pair(), pair());
    let kept = caller.try_clone().unwrap();
    let copies = copied(caller, stream, &[Way::In, Way::Out]);
    inside.write_all(b"last").unwrap();
    drop(inside);
    copies.join();
    // The caller goes on where the container has stopped.
    (&kept).write_all(b" words").unwrap();
    drop(kept);
    assert_eq!(rest(&peer), "last words");
}

#[test]
fn a_writer_learns_that_its_reader_inside_is_gone() {
    let (reader, mut writer) = io::pipe().unwrap();
    let (inside, stream) = pair();
    let _copies = copied(reader, stream, &[Way::In]);
    writer.write_all(b"x").unwrap();
    (&inside).read_exact(&mut [0]).unwrap();
    drop(inside);
    let mut watched = [PollFd::new(&writer, PollFlags::empty())];
    let patience = Timespec::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut watched, Some(&patience)).unwrap(), 1, "nobody let go of the reader");
    assert_eq!(writer.write(b"y").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn a_container_learns_that_its_reader_is_gone_before_it_writes() {
    let (reader, writer) = io::pipe().unwrap();
    let (inside, stream) = pair();
    let copies = copied(writer, stream, &[Way::Out]);
    drop(reader);
    assert_eq!(rest(&inside), "");
    copies.join();
}

#[test]
fn a_pipe_that_does_not_block_loses_nothing() {
    let (mut reader, writer) = io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    let (mut inside, stream) = pair();
    let copies = copied(writer, stream, &[Way::Out]);
    let feeding = thread::spawn(move || inside.write_all(&[7; 1 << 20]).unwrap());
    let mut received = Vec::new();
    reader.read_to_end(&mut received).unwrap();
    assert!(received == vec![7; 1 << 20], "{} bytes", received.len());
    feeding.join().unwrap();
    copies.join();
}

#[test]
fn output_is_passed_on_to_its_end() {
    let (mut container, mut reader, copies) = drained();
    container.write_all(b"all of it").unwrap();
    drop(container);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "all of it");
    copies.join();
}

#[test]
fn a_reader_is_not_held_up_while_the_container_is_silent() {
    let (mut container, mut reader, copies) = drained();
    container.write_all(b"x").unwrap();
    reader.read_exact(&mut [0]).unwrap();
    // Time for the copy to wait for more.
    thread::sleep(Duration::from_millis(100));
    rustix::io::ioctl_fionbio(&reader, true).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let reading = thread::spawn(move || sender.send(reader.read(&mut [0])));
    let read = receiver.recv_timeout(Duration::from_secs(5));
    // The end frees a reader that was held up.
    drop(container);
    copies.join();
    reading.join().unwrap().unwrap();
    assert_eq!(read.unwrap().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_wait_ends_with_the_bytes_the_end_or_the_time() {
    let ((mut container, mut reader, copies), quiet) = (drained(), Duration::from_millis(200));
    let (id, longest) = (CopyId(0), Duration::from_secs(60));
    container.write_all(b"12345").unwrap();
    copies.wait(&[(id, 5)], longest, longest);
    reader.read_exact(&mut [0; 5]).unwrap();
    let begin = Instant::now();
    copies.wait(&[(id, 6)], quiet, longest);
    copies.wait(&[(id, 6)], longest, quiet);
    assert!(begin.elapsed() >= quiet * 2);
    drop(container);
    copies.wait(&copies.outputs(), longest, longest);
    copies.join();
}

#[test]
fn copies_that_are_halted_go_on_without_a_byte_lost() {
    let (mut container, mut reader, copies) = drained();
    // Much less than one step of the copy: it waits in its first write when it is halted.
    fcntl_setpipe_size(&reader, 4096).unwrap();
    let sent: Vec<u8> = (0..=u8::MAX).cycle().step_by(7).take(CHUNK * 3 + 11).collect();
    let all = sent.clone();
    let writing = thread::spawn(move || {
        container.write_all(&all).unwrap();
        container
    });
    poll(&mut [PollFd::new(&reader, PollFlags::IN)], None).unwrap();
    let mut halted = copies.halt().unwrap();
    assert_eq!(halted.len(), 1);
    assert!(!halted[0].pending.is_empty());
    halted[0].take_rest(sent.len() - 4096, PATIENCE);
    // The guest is not needed any more.
    drop(writing.join().unwrap());
    let mut copies = Copies::new();
    copies.resume(halted.remove(0)).unwrap();
    let mut received = Vec::new();
    reader.read_to_end(&mut received).unwrap();
    assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
    copies.join();
}

#[test]
fn a_copy_that_waits_for_input_is_halted_too() {
    let (_peer, _inside, copies) = relayed();
    assert_eq!(copies.halt().unwrap().len(), 2);
}
