package lab

import (
	"context"
	"errors"
)

// Status is what there is of a lab.
type Status struct {
	Dir     string        `json:"dir"`
	ID      string        `json:"id"`
	Storage string        `json:"storage"`
	Hosts   []HostStatus  `json:"hosts"`
	Guests  []GuestStatus `json:"guests"`
}

// HostStatus is a host of a lab.
type HostStatus struct {
	Name      string `json:"name"`
	Address   string `json:"address"`
	Namespace string `json:"namespace"`
	Agent     bool   `json:"agent"` // it runs
	Socket    string `json:"socket"`
	Log       string `json:"log"`
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
	s := Status{Dir: l.dir, ID: l.state.ID, Storage: l.Storage(), Guests: []GuestStatus{}}
	for _, host := range l.Hosts() {
		runs, err := l.AgentRuns(host)
		if err != nil {
			return s, err
		}
		s.Hosts = append(s.Hosts, HostStatus{
			Name: host, Address: addresses(hostNumber(host))[0].Addr().String(),
			Namespace: l.namespace(host), Agent: runs, Socket: l.AgentSocket(host), Log: l.AgentLog(host),
		})
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
