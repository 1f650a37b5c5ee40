package lab

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
)

// DefaultDir is the state folder of a lab that was given none.
const DefaultDir = "/var/lib/lmctl/lab"

// Client is the name of the node that is no host, from which guests are used.
const Client = "client"

// switchNode is the name of the node that connects all others.
const switchNode = "sw"

// Bridge is the bridge of each host: guests' network cards belong on it.
const Bridge = "br0"

// AgentPort is where each agent listens.
const AgentPort = 7410

// MaxHosts is how many hosts a lab may have.
const MaxHosts = 50

// The lab's networks. They exist only inside its namespaces, so all labs have
// the same. Hosts have the numbers from 1, guests those from 100.
var (
	network4 = netip.MustParsePrefix("10.77.0.0/24")
	network6 = netip.MustParsePrefix("fd00:77::/64")
)

const (
	clientNumber = 254
	firstGuest   = 100
	lastGuest    = 250
)

// HostName is the name of host i, counted from 1.
func HostName(i int) string { return "host" + strconv.Itoa(i) }

// hostNumber is the i of HostName, or 0 for what is no host's name.
func hostNumber(name string) int {
	digits, ok := strings.CutPrefix(name, "host")
	i, err := strconv.Atoi(digits)
	if !ok || err != nil || i < 1 || name != HostName(i) {
		return 0
	}
	return i
}

// addresses are those of a number in the lab's networks.
func addresses(number int) []netip.Prefix {
	a4, a6 := network4.Addr().As4(), network6.Addr().As16()
	a4[3], a6[15] = byte(number), byte(number)
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4(a4), network4.Bits()),
		netip.PrefixFrom(netip.AddrFrom16(a6), network6.Bits()),
	}
}

// HostAddress is the IPv4 address of a host or of the client.
func HostAddress(node string) (netip.Addr, error) {
	if node == Client {
		return addresses(clientNumber)[0].Addr(), nil
	}
	if i := hostNumber(node); i > 0 && i <= MaxHosts {
		return addresses(i)[0].Addr(), nil
	}
	return netip.Addr{}, fmt.Errorf("lab: no such node: %q", node)
}

// namespace is the name of a node's network namespace.
func (l *Lab) namespace(node string) string { return namespacePrefix(l.state.ID) + node }

func namespacePrefix(id string) string { return "lmctl-" + id + "-" }

// Nodes are the names of all nodes that commands can be run on.
func (l *Lab) Nodes() []string { return append(l.Hosts(), Client) }

// Hosts are the names of the hosts.
func (l *Lab) Hosts() []string {
	names := make([]string, l.state.Hosts)
	for i := range names {
		names[i] = HostName(i + 1)
	}
	return names
}

// Storage is the folder that all hosts see under the same path.
func (l *Lab) Storage() string { return filepath.Join(l.dir, "storage") }

// HostDir is where a host keeps what is its own.
func (l *Lab) HostDir(host string) string { return filepath.Join(l.dir, "hosts", host) }

// DiskDir is where a host keeps what outlives a reboot.
func (l *Lab) DiskDir(host string) string { return filepath.Join(l.HostDir(host), "disk") }

// StateDir and MemoryDir are those of a host's agent.
func (l *Lab) StateDir(host string) string  { return filepath.Join(l.DiskDir(host), "state") }
func (l *Lab) MemoryDir(host string) string { return filepath.Join(l.HostDir(host), "memory") }

// RunDir is the agent's too. With libvirt it is /run/lmctl on the host.
func (l *Lab) RunDir(host string) string {
	if l.hasMounts(host) {
		return filepath.Join(l.runRoot(host), "lmctl")
	}
	return filepath.Join(l.HostDir(host), "run")
}

// AgentSocket is where a host's agent answers lmctl on that host.
func (l *Lab) AgentSocket(host string) string { return filepath.Join(l.RunDir(host), "agent.sock") }

// AgentConfig and AgentLog are files of a host's agent.
func (l *Lab) AgentConfig(host string) string { return filepath.Join(l.HostDir(host), "agent.yaml") }
func (l *Lab) AgentLog(host string) string    { return l.DaemonLog(host, Agent) }

// CertDir holds the certificate of a host, or of the operator.
func (l *Lab) CertDir(name string) string { return filepath.Join(l.dir, "pki", name) }
