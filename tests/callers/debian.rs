//! A small Debian image under Docker: its programs work as with runc.

use std::fs;

use bulkhead_tests::docker::Docker;
use bulkhead_tests::runtime::told;

use super::wait_for_nothing;

const RUNTIMES: [&str; 2] = ["runc", "bulkhead"];
/// Reads attributes of many files and the content of some, and connects processes with pipes.
const READS: &str = r#"
    find /etc /usr/bin -xdev -printf '%p %y %m %U %G %n %s %l\n' | sort
    dpkg --list; dpkg --verify coreutils; apt-get --version
    perl -e 'pipe(my $r, my $w); if (!fork) { print $w "from the child\n"; exit 3 }
        close $w; print <$r>; wait; print $? >> 8, "\n"'
    python3 -c 'import subprocess as s; print(s.run(["arch"], capture_output=True))'
    exit 7"#;
/// What a user other than root may do, and may not.
const UNPRIVILEGED: &str = r#"
    id; pwd; bash -lc 'echo $HOME $PATH'
    cat /etc/shadow; touch /etc/new; chown root /tmp; rm /etc/passwd
    umask 27; echo own > /tmp/own; mkdir /tmp/dir; ls -ld --time-style=+ /tmp /tmp/own /tmp/dir
    exit 3"#;
/// Adds, uses and removes a user and a package.
const CHANGES: &str = r#"
    set -e
    useradd --create-home --groups users joe
    su joe -c 'id; cd; pwd; ls -lA --time-style=+'
    mkdir -p /build/DEBIAN /build/etc /build/usr/bin; cd /build/DEBIAN
    printf '%s\n' 'Package: small' 'Version: 1' 'Architecture: all' 'Depends: adduser' \
        'Maintainer: joe <joe@localhost>' 'Description: small' > control
    echo /etc/small.conf > conffiles; echo default > ../etc/small.conf
    echo activate-noawait ldconfig > triggers
    printf '#!/bin/sh\ncat /var/lib/small/state\n' > ../usr/bin/small
    printf '%s\n' '#!/bin/sh' 'set -e' \
        'adduser --quiet --system --group --home /var/lib/small small' \
        'su -s /bin/sh small -c "umask 27; id -un > /var/lib/small/state"' \
        'update-alternatives --install /usr/bin/tiny tiny /usr/bin/small 10' > postinst
    printf '%s\n' '#!/bin/sh' 'update-alternatives --remove tiny /usr/bin/small' > prerm
    chmod 755 postinst prerm ../usr/bin/small
    dpkg-deb --root-owner-group --build /build /small.deb
    apt-get install --yes -qq /small.deb
    tiny; stat -c '%a %U %G' /var/lib/small/state; dpkg --verify small; dpkg --audit
    echo changed > /etc/small.conf; dpkg --verify small || true
    dpkg --remove small; cat /etc/small.conf; dpkg --purge small; ls -d /etc/small.conf || true
    userdel --remove joe; ls /home; tail -n 3 /etc/passwd /etc/group; exit 5"#;
/// An image with a user of its own, who runs one of the build steps.
const STEPS: &str = r#"FROM debian
RUN adduser --quiet --system --group --home /srv/app app && install -d -o app -g app /srv/app/data
USER app
WORKDIR /srv/app/data
RUN id -un > who && perl -e 'print "$_\n" for 1..1000' | gzip > numbers.gz
CMD ["bash", "-lc", "id; pwd; ls -ln --time-style=+; cat who; zcat numbers | tail -n 1; exit 4"]
"#;
/// Changes, moves, removes, links and copies files of the image.
const REPLACED: &str = "cd /etc; mv skel skeleton; rm motd; rm -r rc6.d; ln issue too; ln -s issue link; \
    chmod 600 fstab; chown app:app timezone; echo more >> shells; cp -a pam.d /copy; mkfifo /fifo; \
    truncate --size 1M /sparse; touch --date @1 /old; chmod u+s /old";
/// Shows these changes in the image that was committed.
const REPLACEMENTS: &str = "cd /etc; tail -n 1 shells; ls -lnd --time-style=+%s motd rc6.d; \
    stat -c '%n %A %h %U %s' skeleton/.* too fstab timezone shells /copy/* /fifo /sparse /old; exit 6";

/// A single test, because importing the image takes as long as the rest.
#[test]
#[ignore = "long: --suite callers_long"]
fn a_debian_image_does_as_under_runc() {
    let docker = Docker::start().unwrap();
    docker.import_debian().unwrap();
    let script = |options: &[&str], script: &str, status: i32| {
        assert_same(&docker, options, &["debian", "bash", "-c", script], status);
    };
    script(&[], READS, 7);
    script(&["--user", "www-data:users"], UNPRIVILEGED, 3);
    script(&[], CHANGES, 5);

    let context = docker.directory().join("context");
    fs::create_dir(&context).unwrap();
    fs::write(context.join("Dockerfile"), STEPS).unwrap();
    let place = context.to_str().unwrap();
    docker.ok(&["build", "--network", "none", "--tag", "built", place]).unwrap();
    assert_same(&docker, &[], &["built"], 4);

    let [theirs, ours] = RUNTIMES.map(|runtime| replaced(&docker, runtime));
    assert_eq!(ours, theirs);
    let listed = ["made-under-bulkhead", "bash", "-c", REPLACEMENTS];
    assert_same(&docker, &["--user", "root"], &listed, 6);
    wait_for_nothing(docker.directory());
}

/// Runs an image with the same command under runc and under Bulkhead; the output must be the same.
fn assert_same(docker: &Docker, options: &[&str], rest: &[&str], status: i32) {
    let [theirs, ours] = RUNTIMES.map(|runtime| {
        let fixed =
            ["run", "--rm", "--network", "none", "--hostname", "same", "--runtime", runtime];
        told(&docker.call(&[&fixed[..], options, rest].concat()).unwrap())
    });
    // Report only the first line that differs, not hundreds of lines.
    for (theirs, ours) in theirs.1.lines().zip(ours.1.lines()) {
        assert_eq!(ours, theirs, "{rest:?}");
    }
    assert_eq!(ours, theirs, "{rest:?}");
    assert_eq!(ours.0, Some(status), "{ours:?}");
}

/// Logs in to a container of the built image, changes files and commits them to an image. Returns
/// the login's result and the files that `docker diff` lists.
fn replaced(docker: &Docker, runtime: &str) -> (Option<i32>, String, String, Vec<String>) {
    let run = ["run", "-d", "--network", "none", "--hostname", "same", "--name", runtime];
    docker.ok(&[&run[..], &["--runtime", runtime, "built", "sleep", "1000"]].concat()).unwrap();
    let login = "id; echo $HOME $PWD; shopt login_shell; cat who > copy; touch /etc/new; exit 9";
    let login = docker.call(&["exec", runtime, "bash", "-lc", login]).unwrap();
    let (status, out, errors) = told(&login);
    assert_eq!(status, Some(9), "{login:?}");
    docker.ok(&["exec", "--user", "root", runtime, "bash", "-ec", REPLACED]).unwrap();
    let files = docker.ok(&["diff", runtime]).unwrap();
    let mut files: Vec<String> = files.lines().map(str::to_owned).collect();
    files.sort_unstable();
    docker.ok(&["commit", runtime, &format!("made-under-{runtime}")]).unwrap();
    docker.ok(&["rm", "--force", runtime]).unwrap();
    (status, out, errors, files)
}
