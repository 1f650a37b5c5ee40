package workload

import "sync"

// Problems keeps the first few things that were found wrong.
type Problems struct {
	mu   sync.Mutex
	list []string
}

const maxProblems = 8

// Add notes err.
func (p *Problems) Add(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.list) < maxProblems {
		p.list = append(p.list, err.Error())
	}
}

// List returns what was noted, oldest first, never nil.
func (p *Problems) List() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string{}, p.list...)
}
