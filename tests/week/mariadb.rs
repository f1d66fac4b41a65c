//! MariaDB with its data on a volume.

use crate::room::{Debian, same};

const SERVER: &str = r#"
if ! [ -d /v/data/mysql ]; then
    install -d -o mysql -m 700 /v/data
    mariadb-install-db --user=mysql --datadir=/v/data --auth-root-authentication-method=normal \
        --skip-test-db > /tmp/install 2>&1 || { cat /tmp/install; exit 1; }
fi
exec mariadbd --user=mysql --datadir=/v/data --socket=/tmp/socket --pid-file=/tmp/pid \
    --innodb-buffer-pool-size=32M
"#;

const RIGHT: &str = "600 rows of 3 writers
SIGKILL: base.kept OK, what was told is there: 1
SIGTERM: base.kept OK, 1";

#[test]
#[ignore = "long: --suite week"]
fn mariadb() {
    same("MariaDB, kill -9, restart", Debian::More, RIGHT, |room| {
        let server = room.container("mariadb", SERVER);
        let serve = || server.start_until("mariadb-admin -S /tmp/socket ping");
        let query = |query: &str| server.exec(&format!("mariadb -S /tmp/socket -BN -e '{query}'"));
        serve();
        query(
            "create database base; create table base.kept (id int auto_increment primary key, \
               who int, text varchar(500)) engine=innodb; create table base.told (id int primary key)",
        );
        let writers = "for who in 1 2 3; do (for turn in $(seq 200); do \
            echo \"insert into kept (who, text) values ($who, repeat(\\\"x\\\", 400));\"; done | \
            mariadb -S /tmp/socket base) & done; wait";
        server.exec(writers);
        let rows = query("select count(*) from base.kept");
        let writers = query("select count(distinct who) from base.kept");
        let mut did = format!("{rows} rows of {writers} writers\n");

        let client = "seq 1000000 | sed 's/.*/insert into told values (&); select &;/' | \
                      mariadb -S /tmp/socket -nBN base";
        let (told, client) = server.told_until(client, 100);
        server.end_by("KILL");
        let told = told.max(client.last_number());
        serve();
        let check = "mariadb-check -S /tmp/socket base kept | tr -s ' '";
        let kept = |told: u64| {
            query(&format!("select count(*) = {told} from base.told where id <= {told}"))
        };
        did +=
            &format!("SIGKILL: {}, what was told is there: {}\n", server.exec(check), kept(told));
        server.end_by("TERM");
        serve();
        did + &format!("SIGTERM: {}, {}", server.exec(check), kept(told))
    });
}
