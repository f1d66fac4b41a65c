//! PostgreSQL with its data on a volume.

use crate::room::{Container, Debian, same};

/// Makes the database unless it is there, says how it was left, and serves it.
const SERVER: &str = r#"
PATH=/usr/lib/postgresql/15/bin:$PATH
as="setpriv --reuid postgres --regid postgres --init-groups"
if ! [ -s /v/data/PG_VERSION ]; then
    install -d -o postgres -m 700 /v/data
    $as initdb -D /v/data --auth trust > /tmp/initdb 2>&1 || { cat /tmp/initdb; exit 1; }
fi
echo "state: $(pg_controldata /v/data | sed -n 's/^Database cluster state: *//p')"
exec $as postgres -D /v/data -c unix_socket_directories=/tmp
"#;
/// One transaction after the other; each number is printed when the server has said that it is
/// safe. Without `-n`, pgbench would empty its history first.
const CLIENT: &str = r#"
psql="psql -h /tmp -U postgres -qAt"
$psql -c 'create table told (id int primary key)'
pgbench -n -h /tmp -U postgres -c 2 -T 100 postgres > /dev/null 2>&1 &
seq 1000000 | sed 's/.*/insert into told values (&) returning id;/' | $psql
"#;
/// How many of them before the server is killed.
const ENOUGH: u64 = 100;

const RIGHT: &str = "100000 rows, 20 transactions of each of 2, balances are right: t
SIGKILL: the database is whole: t, indexes are right, what was told is there: t
SIGINT: the database is whole: t
state: shut down
state: in production
state: shut down";

#[test]
#[ignore = "long: --suite week"]
fn postgresql() {
    same("PostgreSQL, pgbench, kill -9, restart", Debian::Few, RIGHT, |room| {
        let server = room.container("postgresql", SERVER);
        let serve = || server.start_until("pg_isready -h /tmp -U postgres");
        serve();
        server.exec("pgbench -h /tmp -U postgres --initialize postgres 2> /dev/null");
        server.exec("pgbench -h /tmp -U postgres -c 2 -j 2 -t 20 postgres 2> /dev/null");
        let rows = query(&server, "select count(*) from pgbench_accounts");
        let transactions = query(&server, "select count(*) / 2 from pgbench_history");
        let right = query(&server, BALANCES);
        let mut did = format!(
            "{rows} rows, {transactions} transactions of each of 2, balances are right: {right}\n"
        );

        let (told, client) = server.told_until(CLIENT, ENOUGH);
        server.end_by("KILL");
        let told = told.max(client.last_number());
        serve();
        let right = query(&server, BALANCES);
        let check = "/usr/lib/postgresql/15/bin/pg_amcheck -h /tmp -U postgres --install-missing \
                     --heapallindexed -t 'pgbench_*' -t told postgres";
        server.exec(check);
        let kept =
            query(&server, &format!("select count(*) = {told} from told where id <= {told}"));
        did += &format!(
            "SIGKILL: the database is whole: {right}, indexes are right, what was told is there: \
             {kept}\n"
        );

        server.end_by("INT");
        serve();
        did += &format!("SIGINT: the database is whole: {}\n", query(&server, BALANCES));
        let log = server.log();
        let states = log.lines().filter(|line| line.starts_with("state: "));
        did + &states.collect::<Vec<_>>().join("\n")
    });
}

/// Whether all that was paid is on an account.
const BALANCES: &str = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from \
                        pgbench_history)";

fn query(server: &Container<'_>, query: &str) -> String {
    server.exec(&format!("psql -h /tmp -U postgres -qAtc '{query}'"))
}
