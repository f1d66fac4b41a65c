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
setfacl -m u:33:rw,g:8:r file; setfacl -d -m u:33:rwx directory
chown 1234:4321 directory; chmod 2770 directory; chmod 4755 hard
cp /bin/true capable; setcap cap_net_raw+ep capable
touch -d '2001-02-03 04:05:06.123456789' file; touch -h -d '2002-03-04 05:06:07.5' soft
touch -d '1999-01-01' directory
"#;
/// Prints all of it but the numbers of inodes.
const LIST: &str = r#"
list() {
    (cd $1; find . -printf '%P %y %#m %U:%G %n %s %TY-%Tm-%Td %TT %l\n' | grep -v '^ d' | sort
    getfattr -R -d -m '^user|^security|^system' -e hex --absolute-names . | sort
    find . -type f | sort | xargs -d '\n' sha256sum 2> /dev/null | sha256sum
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
echo more >> /v/from/file; touch -d '2001-02-03 04:05:06.123456789' /v/from/file
rm /v/from/dangling; rsync -aHAXS -i --delete /v/from/ /v/rsync/
list /v/from > /tmp/from; compare /v/rsync rsync-after-a-change
tar='tar --xattrs --xattrs-include=* --acls --numeric-owner'
$tar -S -C /v/from -cf /v/tar --exclude=./socket .
mkdir /v/untar /root/untar; $tar -C /v/untar -xpf /v/tar; $tar -C /root/untar -xpf /v/tar
rm /v/from/socket; list /v/from > /tmp/from
compare /v/untar tar; compare /root/untar tar-to-root
$tar -C /v/from --compare -f /v/tar && echo "tar compares"
cp -a /v/from /v/copied; compare /v/copied cp; cp -a /v/from /root/copied; compare /root/copied cp-to-root
mv /v/copied /root/moved; compare /root/moved mv
"#;

#[test]
fn rsync_and_tar() {
    let script = format!("{FILES}{LIST}{COPIES}");
    same("rsync, tar and cp with attributes", Debian::Few, "", |room| {
        room.container("copies", &script).run()
    });
}
