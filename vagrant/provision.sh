#!/bin/sh
# Makes a Debian 13 a host of lmctl's: the package, this host's certificate, the
# agent's configuration, a bridge for guests, a folder for their images.
#
#   provision.sh --name host1 --address 192.168.56.11 --peer host2=192.168.56.12 …
#       --package /opt/lmctl/dist --keys /opt/lmctl/keys
#       --bridge-mac 52:54:00:77:10:01 --bridge-address 10.77.0.1/24
#       --images export
#
#   --package   a folder with one lmctl_*.deb in it
#   --keys      a folder with ca.pem, cert.pem and key.pem
#   --images    what /srv/images is: "export" exports it to the peers by NFS,
#               an address mounts it from there, "local" leaves it as it is
#
# It can be run again, with other values too.
set -eu
export DEBIAN_FRONTEND=noninteractive

fail() {
	echo "provision: $*" >&2
	exit 1
}

name='' address='' package='' keys='' bridge_mac='' bridge_address='' images=local peers=''
while [ $# -gt 0 ]; do
	[ $# -ge 2 ] || fail "$1 wants a value"
	case $1 in
	--name) name=$2 ;;
	--address) address=$2 ;;
	--peer) peers="$peers $2" ;;
	--package) package=$2 ;;
	--keys) keys=$2 ;;
	--bridge-mac) bridge_mac=$2 ;;
	--bridge-address) bridge_address=$2 ;;
	--images) images=$2 ;;
	*) fail "no such option: $1" ;;
	esac
	shift 2
done
for value in "$name" "$address" "$package" "$keys" "$bridge_mac" "$bridge_address"; do
	[ -n "$value" ] || fail "--name, --address, --package, --keys, --bridge-mac and --bridge-address are all wanted"
done
[ -e "$keys/cert.pem" ] || fail "no certificate in $keys: run vagrant/make-keys, then vagrant rsync"

# write_file PATH MODE writes what it reads, unless that is there already; wrote
# says which it was.
write_file() {
	mkdir -p "${1%/*}"
	cat >"$1.new"
	if cmp -s "$1.new" "$1"; then
		rm "$1.new"
		wrote=no
	else
		mv "$1.new" "$1"
		wrote=yes
	fi
	chmod "$2" "$1"
}

# install_packages asks nothing of the network when all is there.
install_packages() {
	case $images in
	export) nfs='nfs-kernel-server' ;;
	local) nfs='' ;;
	*) nfs='nfs-common' ;;
	esac
	missing=''
	for wanted in qemu-system-x86 qemu-utils iproute2 ca-certificates curl $nfs; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$wanted" 2>/dev/null)" = installed ] || missing="$missing $wanted"
	done
	[ -n "$missing" ] || return 0
	apt-get -q -y update
	# shellcheck disable=SC2086 # a list
	apt-get -q -y install --no-install-recommends $missing
}

install_lmctl() {
	set -- "$package"/lmctl_*.deb
	{ [ $# -eq 1 ] && [ -e "$1" ]; } || fail "one lmctl_*.deb is wanted in $package: run make deb, then vagrant rsync"
	sum=$(sha256sum "$1")
	if [ "$(cat /var/lib/lmctl-provision.deb 2>/dev/null)" != "${sum%% *}" ] || [ ! -e /usr/bin/lmctl ]; then
		# The configuration is this script's.
		dpkg --force-confold -i "$1"
		echo "${sum%% *}" >/var/lib/lmctl-provision.deb
	fi
}

# configure sets changed to yes if it changed anything.
configure() {
	changed=no
	for file in ca.pem cert.pem key.pem; do
		if ! cmp -s "$keys/$file" "/etc/lmctl/tls/$file"; then
			install -D -m 600 "$keys/$file" "/etc/lmctl/tls/$file"
			changed=yes
		fi
	done
	# shellcheck disable=SC2086 # a list
	write_file /etc/lmctl/agent.yaml 644 <<-EOT
		# Written by vagrant/provision.sh. lmctl-agent.yaml(5) tells what else there is.
		name: $name
		advertise: $address:7410
		metrics: $address:9410
		peers:
		$(for peer in $peers; do echo "  ${peer%%=*}: ${peer#*=}:7410"; done)
	EOT
	[ "$wrote" = no ] || changed=yes
}

# name_hosts lets the hosts know each other by name.
name_hosts() {
	for host in "$name=$address" $peers; do
		line="${host#*=} ${host%%=*}"
		grep -qxF "$line" /etc/hosts || echo "$line" >>/etc/hosts
	done
}

# make_bridge has guests on all hosts in one network, at every start of the host.
# It is a unit of its own because boxes differ in what configures their network.
make_bridge() {
	write_file /usr/local/sbin/lmctl-bridge 755 <<-EOT
		#!/bin/sh
		# Written by vagrant/provision.sh: br0, with the card of the guests' network.
		set -eu
		[ -e /sys/class/net/br0 ] || ip link add br0 type bridge
		# Its own, so that it does not take that of a guest's tap.
		ip link set br0 address $bridge_mac
		for path in /sys/class/net/*; do
			card=\${path##*/}
			[ "\$card" != br0 ] && [ "\$(cat "\$path/address")" = $bridge_mac ] || continue
			ip address flush dev "\$card"
			ip link set "\$card" master br0 up
		done
		ip address replace $bridge_address dev br0
		ip link set br0 up
	EOT
	write_file /etc/systemd/system/lmctl-bridge.service 644 <<-'EOT'
		[Unit]
		Description=Bridge for guests
		After=network.target
		Before=lmctl-agent.service

		[Service]
		Type=oneshot
		RemainAfterExit=yes
		ExecStart=/usr/local/sbin/lmctl-bridge

		[Install]
		WantedBy=multi-user.target
	EOT
	systemctl daemon-reload
	systemctl -q enable lmctl-bridge
	systemctl restart lmctl-bridge
}

# share_images makes /srv/images one folder on all hosts.
share_images() {
	mkdir -p /srv/images
	case $images in
	local) ;;
	export)
		write_file /etc/exports.d/lmctl.exports 644 <<-EOT
			/srv/images$(for peer in $peers; do printf ' %s(rw,sync,no_subtree_check,no_root_squash)' "${peer#*=}"; done)
		EOT
		systemctl enable --now nfs-server
		exportfs -ra
		;;
	*)
		# Mounted when it is looked into: the host that has it may come up later.
		sed -i '\|[[:space:]]/srv/images[[:space:]]|d' /etc/fstab
		echo "$images:/srv/images /srv/images nfs4 rw,hard,nofail,_netdev,x-systemd.automount 0 0" >>/etc/fstab
		systemctl daemon-reload
		systemctl restart srv-images.automount
		;;
	esac
}

install_packages
name_hosts
make_bridge
share_images
install_lmctl
configure
if [ "$changed" = yes ] || ! systemctl -q is-active lmctl-agent; then
	systemctl restart lmctl-agent
fi
lmctl host check || echo "provision: what fails above may be hosts that are not up yet; look again with: lmctl host check"
