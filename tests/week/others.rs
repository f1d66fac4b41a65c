//! Programs that people run in passing: packages, films, pages, counters.

use crate::room::{Debian, same};

const DPKG: &str = r#"
exec 2>&1
# It only says that apt-utils is not there.
rm /etc/apt/apt.conf.d/70debconf
mkdir -p /build/DEBIAN /build/usr/share/small /build/etc; cd /build
for n in $(seq 50); do echo $n > usr/share/small/$n; done
for version in 1 2; do
    printf 'Package: small\nVersion: %s\nArchitecture: all\nMaintainer: n <n@localhost>\nDescription: small\n' $version > DEBIAN/control
    echo /etc/small.conf > DEBIAN/conffiles; echo $version > etc/small.conf
    printf '#!/bin/sh\necho "configured $2"\n' > DEBIAN/postinst; chmod 755 DEBIAN/postinst
    dpkg-deb --root-owner-group --build . /v/small_$version.deb > /dev/null
done
for turn in 1 2; do
    apt-get install -y -qq /v/small_1.deb > /dev/null; apt-get install -y -qq /v/small_2.deb | tr -d '\r' | grep configured
    dpkg --verify small; apt-get remove -y -qq small > /dev/null; cat /etc/small.conf
    dpkg --purge small > /dev/null; ls /usr/share/small /etc/small.conf 2> /dev/null | wc -l
done
# One that is killed in the middle is finished later.
printf '#!/bin/sh\n[ -e /killed ] || { touch /killed; kill -KILL $PPID; }\n' > DEBIAN/postinst
dpkg-deb --root-owner-group --build . /v/small_3.deb > /dev/null
status=0; dpkg --install /v/small_3.deb > /dev/null || status=$?; echo "ended with $status"
dpkg --audit | grep -c small; dpkg --configure -a > /dev/null; dpkg-query -W small
dpkg --audit | wc -l
"#;
const DPKG_RIGHT: &str = "configured 1
2
0
configured 1
2
0
Killed
ended with 137
1
small\t2
0";

#[test]
#[ignore = "long: --suite week"]
fn apt_and_dpkg() {
    same("apt and dpkg in a loop", Debian::More, DPKG_RIGHT, |room| {
        room.container("dpkg", DPKG).run()
    });
}

const FILM: &str = r#"
cd /v
ffmpeg -v error -f lavfi -i testsrc=duration=1:size=160x120:rate=10 -f lavfi -i sine=duration=1 \
    -c:v mpeg4 -c:a aac -flags bitexact -threads 2 -y film.mp4
ffprobe -v error -show_entries stream=codec_name,nb_frames -of csv=p=0 film.mp4
ffmpeg -v error -i film.mp4 -vf scale=80:60 -c:v libx264 -preset ultrafast -an -y small.mkv
ffmpeg -v error -i small.mkv -f framemd5 - | grep -vc '^#'
ffmpeg -v error -i film.mp4 -frames:v 3 frame%d.png; ls frame*.png | wc -l
mkfifo pipe; ffmpeg -v error -i film.mp4 -f rawvideo -pix_fmt gray -y pipe & wc -c < pipe
"#;

#[test]
#[ignore = "long: --suite week"]
fn ffmpeg() {
    let right = "mpeg4,10\naac,45\n10\n3\n192000";
    same("ffmpeg", Debian::More, right, |room| room.container("ffmpeg", FILM).run());
}

const PAGE: &str = r#"
cat > /v/page.html <<'END'
<!doctype html><title>page</title><p id=p>before</p>
<script>
const worker = new Worker(URL.createObjectURL(new Blob(["postMessage([1, 2, 3].map(n => n * 2).join())"])));
worker.onmessage = message => { document.getElementById("p").textContent = "worker says " + message.data; };
</script>
END
options="--headless --no-sandbox --disable-gpu --user-data-dir=/tmp/profile --no-first-run --virtual-time-budget=20000"
timeout 700 chromium $options --dump-dom file:///v/page.html 2> /tmp/errors | grep -o '<p.*</p>' || cat /tmp/errors
timeout 700 chromium $options --screenshot=/v/page.png --window-size=200,100 file:///v/page.html 2> /dev/null
head -c 4 /v/page.png | tail -c 3; echo
"#;

#[test]
#[ignore = "long: --suite week"]
fn chromium() {
    let right = "<p id=\"p\">worker says 2,4,6</p>\nPNG";
    same("Chromium headless", Debian::More, right, |room| room.container("chromium", PAGE).run());
}

const COUNTERS: &str = r#"
perf=$(ls /usr/bin/perf* | grep -E 'perf(_[0-9.]*)?$' | head -n 1)
echo 1 > /proc/sys/kernel/perf_event_paranoid || true
$perf stat -x, -e task-clock,context-switches,page-faults -o /tmp/stat sh -c 'for n in $(seq 100); do :; done'
cut -d , -f 3 /tmp/stat | grep -v '^#' | grep .; awk -F , '$1 > 0 { n++ } END { print (n > 1) }' /tmp/stat
$perf record -q -e cpu-clock -o /tmp/data sh -c 'n=0; while [ $n -lt 20000 ]; do n=$((n + 1)); done' 2> /dev/null
$perf report -q -i /tmp/data --stdio --sort comm 2> /dev/null | grep -o ' sh' | head -n 1
"#;

#[test]
#[ignore = "long: --suite week"]
fn perf() {
    let right = "task-clock\ncontext-switches\npage-faults\n1\n sh";
    same("perf", Debian::More, right, |room| room.container("perf", COUNTERS).privileged().run());
}

/// A job each minute that takes longer than one: all but the first find the lock taken.
const CRON: &str = r#"
echo '* * * * * root flock -n /v/lock sh -c "echo ran >> /v/ran; exec sleep 1000" || echo busy >> /v/ran' > /etc/cron.d/job
chmod 644 /etc/cron.d/job
exec cron -f
"#;

#[test]
#[ignore = "long: --suite week"]
fn cron() {
    same("cron with flock", Debian::More, "ran\nbusy", |room| {
        let container = room.container("cron", CRON);
        container.start();
        let two = "[ -e /v/ran ] && [ $(wc -l < /v/ran) -ge 2 ]";
        container.until(two);
        container.exec("head -n 2 /v/ran")
    });
}
