package batch

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
)

// Estimated.Binds is a text that says what limits the speed of the batch. If no limit slows the
// batch down, the text is the constant ownRate.
const ownRate = "each disk's own rate binds it"

// Expected is what a forecast knows about a job before it runs.
type Expected struct {
	Job   *Job
	Size  int64   // of the source, in bytes; Run starts the largest first; -1: unknown
	Bytes int64   // bytes to copy
	Rate  float64 // bytes per second if the job runs alone
	// These fields are for a job on a host. Connections is the number of connections with which the
	// job reaches Rate. If Fixed is true, the job runs only with exactly this number of
	// connections. If Fixed is false, it also runs with fewer. Buffers is the memory, in bytes,
	// that each connection reserves on the host.
	Connections int
	Fixed       bool
	Buffers     int64
}

// Reached holds rates, in bytes per second, that were measured while several disks were read at
// the same time. Where a rate is missing or 0, each disk is as fast as when it is read alone.
type Reached struct {
	ByHost map[string]float64 // rates of the disks of one host, by Job.HostKey
	All    float64            // rate of the disks of all hosts
}

// Estimated is the forecast of a batch.
type Estimated struct {
	Time  time.Duration
	Binds string // what slows the batch down for the longest time
	Last  *Job   // the job that ends last; nil: there are no jobs
}

// Estimate forecasts a batch by simulating it. Jobs start in the order in which Run starts
// them, each with the connections that its host has room for. The rate of a job is proportional
// to its number of connections. All jobs together are at most as fast as Limits.Rate and the
// measured rates allow. Targets are assumed to be fast enough.
func Estimate(jobs []Expected, limits Limits, measured Reached) Estimated {
	f := newForecast(jobs, limits, measured)
	var result Estimated
	waits := map[string]float64{} // for each bound, the seconds in which it applied
	seconds := 0.0
	for f.start(); len(f.active) > 0; f.start() {
		f.connect()
		bound := f.limit()
		next := -1.0
		for _, c := range f.active {
			if c.rate > 0 && (next < 0 || c.left/c.rate < next) {
				next = c.left / c.rate
			}
		}
		seconds += next
		waits[bound] += next
		f.active = slices.DeleteFunc(f.active, func(c *copying) bool {
			c.left -= c.rate * next
			if c.rate == 0 || c.left >= 1 {
				return false
			}
			f.run.release(c.Job.Demand())
			f.left[c.Job.HostKey()] -= float64(c.Bytes)
			result.Last = c.Job
			return true
		})
	}
	result.Time = time.Duration(seconds * float64(time.Second))
	most := -1.0
	for bound, time := range waits {
		if time > most || time == most && (result.Binds == ownRate || bound != ownRate && bound < result.Binds) {
			most, result.Binds = time, bound
		}
	}
	return result
}

// Opening returns the jobs that Run starts when a batch begins. In the result, the Rate of a job is
// the rate that the job reaches with its share of the connections. Jobs that must wait for their
// first connection are left out.
func Opening(jobs []Expected, limits Limits) (at []Expected) {
	f := newForecast(jobs, limits, Reached{})
	f.start()
	f.connect()
	for _, c := range f.active {
		if c.rate > 0 {
			c.Rate = c.rate
			at = append(at, c.Expected)
		}
	}
	return at
}

// forecast is a batch that Estimate simulates.
type forecast struct {
	run     *run // counts the running jobs against the limits
	reached Reached
	known   map[*Job]Expected
	queue   []*attempt
	active  []*copying         // in the order in which they started
	left    map[string]float64 // bytes that are left to copy, by Job.HostKey
	// For each host, bounds has a text that says why several disks of this host are slower together
	// than each disk alone. The key is Job.HostKey.
	bounds map[string]string
}

// forecastRunner is the Runner of a simulated job. Only its method Size is called.
type forecastRunner struct {
	Runner
	size int64
}

func (r forecastRunner) Size() int64 { return r.size }

// The type copying is a simulated job that has started.
type copying struct {
	Expected
	left        float64 // bytes that are left to copy
	connections int
	rate        float64
}

func newForecast(jobs []Expected, limits Limits, reached Reached) *forecast {
	limits = limits.WithDefaults()
	f := &forecast{
		run:     &run{o: Options{Limits: limits}, servers: map[string]int{}, hosts: map[string]int{}},
		reached: reached, known: make(map[*Job]Expected, len(jobs)), left: map[string]float64{},
	}
	for _, e := range jobs {
		e.Rate = max(e.Rate, 1)
		f.known[e.Job] = e
		f.left[e.Job.HostKey()] += float64(e.Bytes)
		f.queue = append(f.queue, &attempt{job: e.Job, runner: forecastRunner{size: e.Size}, demand: e.Job.Demand()})
	}
	f.queue = longestFirst(f.queue)
	return f
}

// The method start starts those simulated jobs that the limits allow to run now.
func (f *forecast) start() {
	for f.run.disks < f.run.o.Limits.Total {
		i := slices.IndexFunc(f.queue, func(a *attempt) bool { return f.run.fits(&a.demand) })
		if i < 0 {
			return
		}
		e := f.known[f.queue[i].job]
		f.queue = slices.Delete(f.queue, i, i+1)
		f.run.occupy(e.Job.Demand())
		f.active = append(f.active, &copying{Expected: e, left: float64(e.Bytes)})
	}
}

// The method connect distributes the connections of each host among its copies, and sets the rate
// of each copy. It uses the rules by which vddk.Budget distributes connections among real copies.
// First, in the order in which the copies started, each gets the connections without which it
// cannot begin. The remaining connections are given out one at a time, to each copy in turn.
func (f *forecast) connect() {
	type host struct {
		copies []*copying
		free   int64
		waits  bool // a copy waits for its first connections; until it has them, no other copy gets more
	}
	bytes := f.run.o.Limits.NFCBuffer
	connections := int64(f.run.o.Limits.Connections)
	least := (bytes + connections - 1) / connections
	hosts := map[string]*host{}
	f.bounds = map[string]string{}
	for _, c := range f.active {
		key := c.Job.HostKey()
		c.rate = c.Rate
		if key == "" || c.Connections == 0 {
			continue
		}
		h := hosts[key]
		if h == nil {
			h = &host{free: bytes}
			hosts[key] = h
		}
		h.copies = append(h.copies, c)
		c.connections = 1
		if c.Fixed {
			c.connections = c.Connections
		}
		need := min(int64(c.connections)*max(c.Buffers, least), bytes)
		if h.waits = h.waits || need > h.free; h.waits {
			c.connections = 0
		} else {
			h.free -= need
		}
	}
	for key, h := range hosts {
		for more := !h.waits; more; {
			more = false
			for _, c := range h.copies {
				if need := max(c.Buffers, least); !c.Fixed && c.connections < c.Connections && need <= h.free {
					c.connections++
					h.free -= need
					more = true
				}
			}
		}
		for _, c := range h.copies {
			c.rate *= float64(c.connections) / float64(c.Connections)
			switch {
			case c.connections == c.Connections:
			case c.Buffers < least:
				f.bounds[key] = fmt.Sprintf("%slimits.connections, %d, binds it", whose(key), connections)
			default:
				f.bounds[key] = fmt.Sprintf("%slimits.nfc_buffer, %s, binds it", whose(key), bytesize.Format(bytes))
			}
		}
	}
}

// The method limit lowers the rates of the copies to the rates that several disks reach together.
// It returns a text that says what limits the batch at this time.
func (f *forecast) limit() (bound string) {
	sums := map[string]float64{}
	for _, c := range f.active {
		sums[c.Job.HostKey()] += c.rate
	}
	all := 0.0
	slow, longest := "", -1.0 // the host that needs the longest time
	for key, sum := range sums {
		if most := f.reached.ByHost[key]; most > 0 && sum > most {
			f.slowDown(most/sum, func(c *copying) bool { return c.Job.HostKey() == key })
			f.bounds[key] = fmt.Sprintf("what %s gives to several disks at once, %s/s, binds it", nameOf(key), bytesize.Format(int64(most)))
			sum = most
		}
		all += sum
		if time := f.left[key] / max(sum, 1); time > longest || time == longest && key < slow {
			slow, longest = key, time
		}
	}
	limits := f.run.o.Limits
	everyone := func(*copying) bool { return true }
	if most := f.reached.All; most > 0 && all > most && (limits.Rate == 0 || most <= float64(limits.Rate)) {
		f.slowDown(most/all, everyone)
		return fmt.Sprintf("what all hosts together give this machine, %s/s, binds it", bytesize.Format(int64(most)))
	}
	if most := float64(limits.Rate); most > 0 && all > most {
		f.slowDown(most/all, everyone)
		return fmt.Sprintf("limits.rate, %s/s, binds it", bytesize.Format(limits.Rate))
	}
	if bound := f.bounds[slow]; bound != "" {
		return bound
	}
	if len(f.queue) > 0 && len(f.active) == limits.Total {
		return fmt.Sprintf("limits.total, %d disks at once, binds it", limits.Total)
	}
	if len(f.queue) > 0 {
		waiting := f.queue[0].job
		if i := slices.IndexFunc(f.queue, func(a *attempt) bool { return a.job.HostKey() == slow }); i >= 0 {
			waiting = f.queue[i].job
		}
		if s := waiting.Server(); s != "" && limits.PerServer > 0 && f.run.servers[s] >= limits.PerServer {
			return fmt.Sprintf("%s's limits.per_server, %d disks at once, binds it", s, limits.PerServer)
		}
		return fmt.Sprintf("%s's limits.per_host, %d disks at once, binds it", waiting.Host, limits.PerHost)
	}
	return ownRate
}

func (f *forecast) slowDown(by float64, who func(*copying) bool) {
	for _, c := range f.active {
		if who(c) {
			c.rate *= by
		}
	}
}

// nameOf returns the name of the host or server that a Job.HostKey contains.
func nameOf(key string) string {
	_, name, ok := strings.Cut(key, " ")
	if !ok {
		return "this machine"
	}
	return name
}

func whose(key string) string { return nameOf(key) + "'s " }
