package machine

import "time"

// SetInterval sets the time between two looks at the VM while its disks are copied; 0 means a minute.
func SetInterval(s *Spec, d time.Duration) { s.interval = d }
