//! rsync and tar, with everything that a file can have besides its content.

use crate::room::{Debian, same};

/// Makes files of every kind on the volume.
const FILES: &str = r#"
exec 2>&1
mkdir -p /v/from/directory; cd /v/from
echo text > file; ln file hard; ln -s file soft; ln -s /nowhere dangling; mkfifo fifo
mknod null c 1 3
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
truncate -s 8M sparse; echo end >> sparse
printf 'x%.0s' $(seq 200) > directory/"$(printf 'n%.0s' $(seq 200))"
printf '\303\244 \n new' > "$(printf 'a name\nwith \\ and \303\244')"
setfattr -n user.one -v 1 file; setfattr -n user.binary -v 0x00ff00 directory
chown 1234:4321 directory; chmod 2770 directory; chmod 4755 hard
echo > capable; setcap cap_net_raw+ep capable
find . -exec touch -h -d '2010-01-01' {} +
touch -d '2001-02-03 04:05:06.123456789' file; touch -h -d '2002-03-04 05:06:07.5' soft
touch -d '1999-01-01' directory
"#;
/// Prints all of it but the numbers of inodes.
const LIST: &str = r#"
list() {
    (cd $1
    find . -mindepth 1 -type d -printf '%P %y %#m %U:%G %n %TY-%Tm-%Td %TT\0' -o \
        -mindepth 1 -printf '%P %y %#m %U:%G %n %s %TY-%Tm-%Td %TT %l\0' | sort -z |
        tr '\n\0' '?\n' | sed 's/n\{9,\}/long/;s/ *$//'
    find . -not -type l -print0 | sort -z | xargs -0 getfattr -d -m '^user|^security|^system' -e hex
    find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum
    [ $(du -k sparse | cut -f 1) -lt 1000 ] && echo sparse
    [ $(stat -c %i file) = $(stat -c %i hard) ] && echo linked)
}
"#;
const COPIES: &str = r#"
compare() { list $1 > /tmp/$2; cmp /tmp/from /tmp/$2 && echo "$2 is the same"; diff /tmp/from /tmp/$2 | head -n 20; }
list /v/from > /tmp/from; cat /tmp/from
rsync -aHAXS --devices --specials /v/from/ /v/rsync/ && compare /v/rsync rsync
rsync -aHAXS --devices --specials /v/from/ /root/rsync/ && compare /root/rsync rsync-to-root
echo "again: $(rsync -aHAXS -i --devices --specials /v/from/ /v/rsync/ | wc -l)"
echo more >> /v/from/file; find . -exec touch -h -d '2010-01-01' {} +
touch -d '2001-02-03 04:05:06.123456789' /v/from/file
rm /v/from/dangling; rsync -aHAXS -i --delete /v/from/ /v/rsync/
list /v/from > /tmp/from; compare /v/rsync rsync-after-a-change
tar='tar --xattrs --xattrs-include=* --numeric-owner'
$tar -S -C /v/from -cf /v/tar --exclude=./socket .
mkdir /v/untar /root/untar; $tar -C /v/untar -xpf /v/tar; $tar -C /root/untar -xpf /v/tar
rm /v/from/socket; list /v/from > /tmp/from
compare /v/untar tar; compare /root/untar tar-to-root
$tar -C /v/from --compare -f /v/tar && echo "tar compares"
cp -a /v/from /v/copied; compare /v/copied cp; cp -a /v/from /root/copied; compare /root/copied cp-to-root
mv /v/copied /root/moved; compare /root/moved mv
"#;

const RIGHT: &str = r"a name?with \ and ä f 0644 0:0 1 8 2010-01-01 00:00:00.0000000000
capable f 0644 0:0 1 1 2010-01-01 00:00:00.0000000000
dangling l 0777 0:0 1 8 2010-01-01 00:00:00.0000000000 /nowhere
directory d 02770 1234:4321 2 1999-01-01 00:00:00.0000000000
directory/long f 0644 0:0 1 200 2010-01-01 00:00:00.0000000000
fifo p 0644 0:0 1 0 2010-01-01 00:00:00.0000000000
file f 04755 0:0 2 5 2001-02-03 04:05:06.1234567890
hard f 04755 0:0 2 5 2001-02-03 04:05:06.1234567890
null c 0644 0:0 1 0 2010-01-01 00:00:00.0000000000
socket s 0755 0:0 1 0 2010-01-01 00:00:00.0000000000
soft l 0777 0:0 1 4 2002-03-04 05:06:07.5000000000 file
sparse f 0644 0:0 1 8388612 2010-01-01 00:00:00.0000000000
# file: capable
security.capability=0x0100000200200000000000000000000000000000

# file: directory
user.binary=0x00ff00

# file: file
user.one=0x31

# file: hard
user.one=0x31

93cc46e5be84eb29757d6da62c9b626a7e6a0f2aa5992e3ea718acaf991d08be  -
sparse
linked
rsync is the same
rsync-to-root is the same
again: 0
*deleting   dangling
.d..t...... ./
>f.s....... file
.L..t...... soft -> file
.d..t...... directory/
hf.s....... hard => file
rsync-after-a-change is the same
tar is the same
tar-to-root is the same
tar compares
cp is the same
cp-to-root is the same
mv is the same";

#[test]
#[ignore = "long: --suite week"]
fn rsync_and_tar() {
    let script = format!("{FILES}{LIST}{COPIES}");
    same("rsync, tar and cp with attributes", Debian::Few, RIGHT, |room| {
        room.container("copies", &script).run()
    });
}

/// Access control lists, on the volume and in the root.
#[test]
fn access_control_lists() {
    let script = "for where in /v /root; do mkdir $where/d; setfacl -m u:33:rw,d:g:8:r $where/d; \
                  (umask 077; touch $where/d/new); getfacl -cnp $where/d $where/d/new; done";
    let one = "user::rwx\nuser:33:rw-\ngroup::r-x\nmask::rwx\nother::r-x\n\
               default:user::rwx\ndefault:group::r-x\ndefault:group:8:r--\n\
               default:mask::r-x\ndefault:other::r-x\n\n\
               user::rw-\ngroup::r-x\t#effective:r--\ngroup:8:r--\nmask::r--\nother::r--\n\n";
    let right = one.repeat(2);
    same("access control lists", Debian::Few, &right, |room| room.container("lists", script).run());
}
