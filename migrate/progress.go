package migrate

import "time"

// observeEvery is how often the observer hears of a pass under way.
const observeEvery = 200 * time.Millisecond

// watch tells the observer of progress until the returned function is called.
func (m *source) watch() (stop func()) {
	if m.job.Observe == nil {
		return func() {}
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(observeEvery)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				m.observe()
			}
		}
	}()
	return func() { close(quit); <-done }
}

// progressNow is what a snapshot is made of. It changes only within observe.
type progressNow struct {
	state  State
	pass   int       // the live pass under way, or the last one
	pages  int64     // its size
	from   int64     // bytes sent before it
	began  time.Time // zero before the first
	passes []Pass    // the finished ones; never changed, only replaced
}

// observe makes changes and hands the observer a snapshot, in order.
func (m *source) observe(changes ...func(*progressNow)) {
	m.telling.Lock()
	defer m.telling.Unlock()
	for _, change := range changes {
		change(&m.now)
	}
	if m.job.Observe != nil {
		m.job.Observe(m.progress())
	}
}

func (m *source) progress() Progress {
	n := m.now
	p := Progress{State: n.state, Pass: n.pass, PassPages: n.pages, Passes: n.passes}
	if n.began.IsZero() {
		return p
	}
	p.BytesSent = m.streams.sent.Load()
	p.CopiedPages = n.pages
	if n.pass > len(n.passes) { // it is under way
		p.CopiedPages = min(m.streams.copied.Load(), n.pages)
	}
	if elapsed := time.Since(n.began).Seconds(); elapsed > 0 {
		p.Rate = float64(p.BytesSent-n.from) / elapsed
	}
	return p
}
