package lab

import (
	"context"
	"errors"
)

// Status is what there is of a lab.
type Status struct {
	Dir     string `json:"dir"`
	ID      string `json:"id"`
	Storage string `json:"storage"`
	// Hypervisor is what runs the guests.
	Hypervisor Hypervisor    `json:"hypervisor"`
	Hosts      []HostStatus  `json:"hosts"`
	Guests     []GuestStatus `json:"guests"`
}

// HostStatus is a host of a lab.
type HostStatus struct {
	Name      string `json:"name"`
	Address   string `json:"address"`
	Namespace string `json:"namespace"`
	Agent     bool   `json:"agent"` // it runs
	Socket    string `json:"socket"`
	Log       string `json:"log"`
	// Daemons are all that run on the host, the agent among them.
	Daemons []DaemonStatus `json:"daemons"`
}

// DaemonStatus is a daemon of a host.
type DaemonStatus struct {
	Name Daemon `json:"name"`
	Runs bool   `json:"runs"`
	Log  string `json:"log"`
}

// GuestStatus is a guest of a lab.
type GuestStatus struct {
	Name    string `json:"name"`
	Kind    Kind   `json:"kind"`
	Address string `json:"address,omitempty"` // of a Linux guest
	Host    string `json:"host,omitempty"`    // where it runs
	Problem string `json:"problem,omitempty"` // why it is not known to run
}

// Status looks at a lab.
func (l *Lab) Status(ctx context.Context) (Status, error) {
	s := Status{Dir: l.dir, ID: l.state.ID, Storage: l.Storage(), Hypervisor: l.Hypervisor(), Guests: []GuestStatus{}}
	for _, host := range l.Hosts() {
		h := HostStatus{
			Name: host, Address: addresses(hostNumber(host))[0].Addr().String(),
			Namespace: l.namespace(host), Socket: l.AgentSocket(host), Log: l.AgentLog(host),
		}
		for _, d := range l.Daemons() {
			runs, err := l.DaemonRuns(host, d)
			if err != nil {
				return s, err
			}
			h.Daemons = append(h.Daemons, DaemonStatus{Name: d, Runs: runs, Log: l.DaemonLog(host, d)})
			h.Agent = h.Agent || d == Agent && runs
		}
		s.Hosts = append(s.Hosts, h)
	}
	guests, err := l.Guests()
	if err != nil {
		return s, err
	}
	for _, g := range guests {
		gs := GuestStatus{Name: g.Name, Kind: g.Kind}
		if g.Kind == Linux {
			gs.Address = g.Addresses()[0].Addr().String()
		}
		if gs.Host, err = l.Locate(ctx, g.Name); err != nil {
			gs.Problem = err.Error()
			if e := (*notOnOneHost)(nil); errors.As(err, &e) {
				gs.Problem = e.where()
			}
		}
		s.Guests = append(s.Guests, gs)
	}
	return s, nil
}
