package batch

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
)

// ownRate is that no limit does.
const ownRate = "each disk's own rate binds it"

// Expected is what is known of a job before it runs.
type Expected struct {
	Job   *Job
	Size  int64   // by which Run sorts; -1: not known
	Bytes int64   // to copy
	Rate  float64 // bytes a second, when it runs alone
	// Of a job of a host: with how many connections that is its rate, whether it
	// has these or none, and what each reserves there, in bytes.
	Connections int
	Fixed       bool
	Buffers     int64
}

// Reached are rates of several disks that are read at once, in bytes a second. Who
// is not there is as fast as alone.
type Reached struct {
	ByHost map[string]float64 // of disks with one HostKey
	All    float64
}

// Estimated is how a batch will go.
type Estimated struct {
	Time  time.Duration
	Binds string // what it waits for most
	Last  *Job   // which ends last; nil: there is none
}

// Estimate plays a batch through: jobs start as Run starts them, each with the
// connections that its host has room for, and its rate is what it was alone, by
// its part of the connections it had then. Together they reach no more than was
// measured, and limits.rate. That targets take what comes is assumed.
func Estimate(jobs []Expected, limits Limits, reached Reached) Estimated {
	f := newForecast(jobs, limits, reached)
	var result Estimated
	waits := map[string]float64{} // seconds in which that was the bound
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

// Opening are the jobs that Run starts at once when a batch begins, with the rates
// that the connections they have then let expect; those that wait for theirs are
// left out.
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

// forecast is a batch that is played.
type forecast struct {
	run     *run // what the limits count
	reached Reached
	known   map[*Job]Expected
	queue   []*attempt
	active  []*copying         // in the order of their start
	left    map[string]float64 // bytes to come of each host
	// Of connect: what keeps disks of a host from being as fast as alone.
	bounds map[string]string
}

// forecastRunner is the Runner of a job that is not run, of which only the size is
// needed.
type forecastRunner struct {
	Runner
	size int64
}

func (r forecastRunner) Size() int64 { return r.size }

// copying is a job under way.
type copying struct {
	Expected
	left        float64 // bytes
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
		f.queue = append(f.queue, &attempt{job: e.Job, runner: forecastRunner{size: e.Size}})
	}
	f.queue = longestFirst(f.queue)
	return f
}

// start starts what the limits let.
func (f *forecast) start() {
	for f.run.disks < f.run.o.Limits.Total {
		i := slices.IndexFunc(f.queue, func(a *attempt) bool { return f.run.fits(a.job.Demand()) })
		if i < 0 {
			return
		}
		e := f.known[f.queue[i].job]
		f.queue = slices.Delete(f.queue, i, i+1)
		f.run.occupy(e.Job.Demand())
		f.active = append(f.active, &copying{Expected: e, left: float64(e.Bytes)})
	}
}

// connect gives each copy its connections and its rate, as vddk.Budget does: what
// each begins with in the order of their start, and then one more to each in turn.
func (f *forecast) connect() {
	type host struct {
		copies []*copying
		free   int64
		waits  bool // somebody, and nobody gets more meanwhile
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

// limit lowers the rates to what they reach together, and says what binds the
// batch now.
func (f *forecast) limit() (bound string) {
	sums := map[string]float64{}
	for _, c := range f.active {
		sums[c.Job.HostKey()] += c.rate
	}
	all := 0.0
	slow, longest := "", -1.0 // the host that has most to do
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

// nameOf returns the host or server of a Job.HostKey.
func nameOf(key string) string {
	_, name, ok := strings.Cut(key, " ")
	if !ok {
		return "this machine"
	}
	return name
}

func whose(key string) string { return nameOf(key) + "'s " }
