#!/busybox sh
# The least that answers `select 1`: modules, the image, the data disk, PostgreSQL with the product's settings.
# No check of the disk, no agent, no supervision. The host waits for the lines that begin with "bare:".
b=/busybox
$b mkdir -p /proc /sys /dev /root
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev 2>/dev/null
exec </dev/console >/dev/console 2>&1
while read -r module; do $b insmod "/modules/${module##*/}" 2>/dev/null; done </modules.order
echo 'bare: modules'
until [ -b /dev/vdc ]; do $b usleep 20000; done
$b mount -t erofs -o ro /dev/vda /root
for place in dev proc sys; do $b mount -o bind /$place /root/$place; done
$b mount -t tmpfs tmpfs /root/run
$b mount -t tmpfs tmpfs /root/tmp
$b mkdir -p /dev/shm /root/run/data /root/run/postgresql /root/run/sovereign
$b mount -t tmpfs tmpfs /root/dev/shm
$b chmod 1777 /root/dev/shm /root/tmp
$b ip link set lo up
$b mount -t ext4 -o noatime /dev/vdc /root/run/data
$b mount -o bind /root/run/data/postgresql /root/var/lib/postgresql
echo 'local all all trust' >/root/run/sovereign/pg_hba.conf
$b cat >/root/run/sovereign/postgresql.conf <<'CONF'
hba_file = '/run/sovereign/pg_hba.conf'
port = '5432'
listen_addresses = '127.0.0.1'
unix_socket_directories = '/run/postgresql'
dynamic_shared_memory_type = 'posix'
shared_buffers = '16MB'
max_connections = '50'
password_encryption = 'scram-sha-256'
jit = 'off'
logging_collector = 'off'
log_destination = 'stderr'
CONF
bin=$(echo /root/usr/lib/postgresql/*/bin)
bin=${bin#/root}
version=${bin#/usr/lib/postgresql/}
version=${version%/bin}
uid=$($b grep '^postgres:' /root/etc/passwd | $b cut -d: -f3)
gid=$($b grep '^postgres:' /root/etc/passwd | $b cut -d: -f4)
$b chown "$uid:$gid" /root/run/postgresql
$b chroot /root /usr/bin/busybox start-stop-daemon -S -b -c postgres:postgres -x "$bin/postgres" -- \
    -D "/var/lib/postgresql/$version/main" -c config_file=/run/sovereign/postgresql.conf
echo 'bare: started'
until [ -S /root/run/postgresql/.s.PGSQL.5432 ]; do $b usleep 20000; done
echo 'bare: socket'
until $b chroot /root "$bin/psql" -h /run/postgresql -U postgres -d postgres -Atqc 'select 1' >/dev/null 2>&1; do
    $b usleep 20000
done
echo 'bare: ready'
pid=$($b head -n1 "/root/var/lib/postgresql/$version/main/postmaster.pid")
$b kill -INT "$pid"
while $b kill -0 "$pid" 2>/dev/null; do $b usleep 50000; done
$b umount /root/var/lib/postgresql
$b umount /root/run/data
$b sync
$b poweroff -f
