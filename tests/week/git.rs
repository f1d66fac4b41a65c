//! git: many small files, renames, locks and packs.

use crate::room::{Debian, same};

const WORK: &str = r#"
exec 2>&1
export GIT_AUTHOR_DATE='2024-01-01T00:00:00Z' GIT_COMMITTER_DATE='2024-01-01T00:00:00Z'
git config --global user.name name; git config --global user.email name@localhost
git config --global init.defaultBranch main; git config --global gc.auto 0
mkdir -p /v/repository; cd /v/repository; git init -q
for directory in $(seq 10); do
    mkdir d$directory
    for file in $(seq 40); do echo "$directory $file" > d$directory/f$file; done
done
git add .; git commit -qm first; git rev-parse HEAD
git status --porcelain | wc -l
for turn in $(seq 5); do
    echo $turn >> d$turn/f1; chmod +x d$turn/f2; git mv d$turn/f3 d$turn/moved; ln -s f1 d$turn/link
    git add .; git commit -qm "turn $turn"
done
git rev-parse HEAD; git status --porcelain | wc -l
git checkout -q -b side HEAD~3; git rm -rq d10; echo side > side; git add side; git commit -qm side
git checkout -q main; git merge -q --no-edit -m merged side; git rev-parse HEAD; ls | wc -l
git repack -adq; git fsck --full --strict; git count-objects -v | grep -E 'in-pack|packs|garbage'
git clone -q --no-local /v/repository /v/clone; git -C /v/clone rev-parse HEAD
git clone -q /v/repository /root/clone; git -C /root/clone status --porcelain | wc -l
cd /v/clone; git worktree add -q ../tree origin/side~1; git -C ../tree rev-parse HEAD
echo changed >> d1/f1; git stash -q; git stash pop -q; git diff --stat | tail -n 1
touch -d '1 hour ago' d2/*; git status --porcelain
# One of two that commit at the same time is refused, and none is lost.
git commit -qam changed
for name in a b; do
    (for turn in $(seq 8); do
        until git commit -q --allow-empty -m $name > /dev/null 2>&1; do sleep 0.02; done
    done) &
done; wait
git rev-list --count HEAD; git fsck --no-dangling
"#;

const RIGHT: &str = "baa9735bd044e43c79fed87f52df406eacf7b3ef
0
5cf13d89fb38e45ecf891024440a9cab324624dd
0
1e77671f9ce37362e47b089de90b1384f48a882f
10
in-pack: 438
packs: 1
garbage: 0
size-garbage: 0
1e77671f9ce37362e47b089de90b1384f48a882f
0
522415d00c9b23946a325feb181189bed4271abc
 1 file changed, 1 insertion(+)
 M d1/f1
25";

#[test]
#[ignore = "long: --suite week"]
fn git() {
    same("git", Debian::Few, RIGHT, |room| room.container("git", WORK).run());
}
