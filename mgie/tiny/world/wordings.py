"""How people ask: the wordings of every operation and ambiguity.

One template a line. `[a|b]` stands for either, `{slot}` for a slot of the edit, `{it}` and `{pic}` for words for the
picture. Lines that begin with `~` are held out: they are in no training sample. A wording of an ambiguity never
says what only the picture shows.
"""

WORDINGS: dict[str, str] = {
    # ---- things
    "recolor": """
        [make|paint|colour|turn] {the} {color}
        change {the} [to|into] {color}
        change the colour of {the} to {color}
        {the} should be {color}
        I want {the} in {color}
        give {the} a {color} colour
        [recolour|repaint] {the} in {color}
        {the} would look better in {color}
        let {the} be {color}
        {color} would suit {the} better
        switch {the} from {old} to {color}
        ~ what if {the} were {color}?
        ~ could {the} be {color} [instead|instead of {old}]?
        ~ dye {the} {color}
    """,
    "recolor_part": """
        [make|paint|colour] the {part} of {the} {color}
        give {the} a {color} {part}
        change the {part} of {the} to {color}
        {the} should have a {color} {part}
        [recolour|repaint] the {part} of {the} in {color}
        turn the {part} of {the} from {old} to {color}
        I want a {color} {part} for {the}
        the {part} of {the} would look better in {color}
        swap the {old} {part} of {the} for a {color} one
        let the {part} of {the} be {color}
        {the} needs a {color} {part}
        a {color} {part} for {the}
        ~ what about a {color} {part} for {the}?
        ~ could the {part} of {the} be {color}?
    """,
    "remove": """
        [remove|delete|erase] {the}
        take {the} [away|out]
        get rid of {the}
        take {the} out of the {pic}
        {the} should [disappear|go|vanish]
        I don't want {the} in the {pic}
        make {the} disappear
        the {pic} without {the}
        cut out {the}
        no more {name} [here|there]: remove {the}
        {the} is in the way, remove it
        clean up the {pic} by removing {the}
        ~ what would it look like without {the}?
        ~ {the} does not belong here
        ~ edit {the} out
    """,
    "remove_all": """
        [remove|delete|erase] all the {all}
        take [all the|all of the] {all} away
        get rid of [every one of the|all the|the] {all}
        no {all} [at all|in the {pic}]
        all {all} should [disappear|go]
        make the {all} disappear
        the {pic} without any {all}
        I don't want to see any {all}
        there should be no {all}
        clear the {pic} of {all}
        remove the {all}
        ~ what would it look like without the {all}?
        ~ not a single {all} should be left
        ~ empty the place of {all}
    """,
    "add": """
        [add|put|place|insert] {new} {place}
        there should be {new} {place}
        I want {new} {place}
        [draw|paint] {new} {place}
        let there be {new} {place}
        put {new} into the {pic}, {place}
        {place} there should be {new}
        {new} {place}, please
        show {new} {place}
        {place}, add {new}
        ~ what if there were {new} {place}?
        ~ it needs {new} {place}
        ~ could you fit in {new} {place}?
    """,
    "duplicate": """
        add [another one like|a twin of|a copy of] {the}
        [duplicate|copy|double] {the}
        put a second {name} like {the} next to it
        make two of {the}
        {the} should have a twin
        I want a second one of {the}
        clone {the}
        give {the} company by another {name} just like it
        there should be two of {the}
        place {same} again, as a copy of {the}
        repeat {the}
        ~ what if there were two of {the}?
        ~ {the} twice
        ~ let {the} appear a second time
    """,
    "replace": """
        [replace|exchange] {the} [with|for] {new}
        swap {the} for {new}
        turn {the} into {new}
        [change|transform] {the} into {new}
        instead of {the} there should be {new}
        put {new} where {the} is
        make {the} {new}
        I want {new} instead of {the}
        {the} should become {new}
        substitute {new} for {the}
        take {the} away and put {new} there
        ~ what if {the} were {new}?
        ~ trade {the} for {new}
        ~ {new} rather than {the}
    """,
    "move": """
        move {the} {where}
        [shift|bring|take|carry] {the} {where}
        put {the} further {where}
        {the} should [be|stand] {there}
        I want {the} {there}
        [push|slide] {the} {where}
        change the position of {the}: {there}
        place {the} {there}
        relocate {the} {where}
        let {the} go {where}
        ~ {the} belongs {there}
        ~ could {the} go {where}?
        ~ drag {the} over {where}
    """,
    "enlarge": """
        make {the} [bigger|larger]
        [enlarge|grow] {the}
        increase the size of {the}
        {the} should be [bigger|larger]
        I want a bigger {name}: enlarge {the}
        scale {the} up
        blow up {the} in size
        let {the} grow
        {the} is too small
        give {the} more size
        [a bigger version of|a larger version of] {the}
        ~ what if {the} were bigger?
        ~ {the} could be bigger
        ~ upsize {the}
    """,
    "shrink": """
        make {the} [smaller|tinier]
        [shrink|reduce] {the}
        decrease the size of {the}
        {the} should be [smaller|tiny]
        I want a smaller {name}: shrink {the}
        scale {the} down
        let {the} shrink
        {the} is too [big|large]
        reduce the size of {the}
        a [smaller|little] version of {the}
        bring {the} down in size
        ~ what if {the} were smaller?
        ~ {the} could be smaller
        ~ miniaturize {the}
    """,
    "turn_around": """
        turn {the} around
        [flip|mirror|reverse] {the}
        {the} should face [the other way|the other direction]
        make {the} face the {side}
        let {the} look to the {side}
        {the} should point to the {side}
        turn {the} to the {side}
        rotate {the} to face the {side}
        I want {the} to face the {side}
        make {the} look the other way
        swing {the} round to the {side}
        let {the} turn back
        ~ what if {the} faced the {side}?
        ~ point {the} to the {side}
    """,
    "swap_places": """
        swap {the} and {other}
        [swap|exchange|switch] the places of {the} and {other}
        let {the} and {other} change places
        put {the} where {other} is and the other way round
        {the} and {other} should [trade|swap] places
        switch {the} with {other}
        exchange the positions of {the} and {other}
        move {the} to where {other} is, and {other} to where {the} is
        change around {the} and {other}
        I want {the} and {other} to switch positions
        {the} in the place of {other} and vice versa
        interchange {the} and {other}
        ~ what if {the} and {other} traded places?
        ~ permute {the} and {other}
    """,
    "swap_colors": """
        swap the colours of {the} and {other}
        [exchange|switch|trade] the colours of {the} and {other}
        let {the} and {other} change colours
        give {the} the colour of {other} and the other way round
        {the} and {other} should [trade|swap] colours
        paint {the} like {other} and {other} like {the}
        {the} in the colour of {other} and vice versa
        I want {the} and {other} to switch colours
        make {the} as {other} is in colour, and {other} as {the}
        interchange the colours of {the} and {other}
        mix up the colours: {the} like {other}, {other} like {the}
        ~ what if {the} and {other} traded colours?
        ~ colour {the} as {other} and vice versa
    """,
    "put_on_hat": """
        give {the} {new}
        put {new} on {the}
        {the} should wear {new}
        add {new} to {the}
        let {the} wear {new}
        I want {the} with {new}
        {the} needs {new}
        dress {the} with {new}
        place {new} on the head of {the}
        [draw|paint] {new} on {the}
        show {the} wearing {new}
        set {new} on the head of {the}
        {the} with {new}, please
        ~ what if {the} had {new}?
        ~ {the} would look good in {new}
    """,
    # ---- optimisation of photos
    "brighter": """
        make {it} [brighter|lighter]
        brighten {it}
        [brighten|lighten] up the {pic}
        increase the [brightness|exposure]
        more light
        turn up the [brightness|exposure]
        {it} should be brighter
        {it} is too dark
        let in more light
        raise the brightness of the {pic}
        a brighter version of the {pic}
        ~ it could use more light
        ~ lift the exposure
        ~ I can hardly see anything, brighten it
    """,
    "darker": """
        make {it} [darker|dimmer]
        darken {it}
        dim the {pic}
        [decrease|lower|reduce] the [brightness|exposure]
        less light
        turn down the [brightness|exposure]
        {it} should be darker
        {it} is too bright
        a darker version of the {pic}
        bring the brightness down
        ~ it could do with less light
        ~ tone down the light of the {pic}
    """,
    "more_contrast": """
        [increase|raise|boost] the contrast
        more contrast
        give {it} more contrast
        make {it} more contrasty
        add contrast to the {pic}
        turn up the contrast
        strengthen the contrast of the {pic}
        {it} needs more contrast
        {it} [looks|is] too flat
        make the darks darker and the lights lighter
        higher contrast
        make the {pic} punchier
        ~ it could use a stronger contrast
        ~ pump up the contrast
    """,
    "less_contrast": """
        [decrease|lower|reduce] the contrast
        less contrast
        give {it} less contrast
        make {it} [softer in contrast|flatter]
        turn down the contrast
        soften the contrast of the {pic}
        {it} has too much contrast
        the contrast is too [hard|strong]
        lower contrast
        flatten the tones of the {pic}
        take some contrast away
        ~ it could do with a weaker contrast
        ~ even out the darks and lights
    """,
    "more_saturation": """
        [increase|raise|boost] the saturation
        more saturation
        make the colours [stronger|more vivid|richer]
        more [vivid|intense] colours
        make {it} more colourful
        turn up the colours
        {it} needs more colour
        the colours should [pop|shine]
        saturate the colours
        intensify the colours of the {pic}
        give {it} stronger colours
        ~ let the colours glow
        ~ pump up the colours
    """,
    "less_saturation": """
        [decrease|lower|reduce] the saturation
        less saturation
        make the colours [weaker|more muted|paler]
        more [muted|subdued] colours
        make {it} less colourful
        turn down the colours
        {it} has too much colour
        the colours are too [strong|loud]
        desaturate the {pic}
        fade the colours of the {pic}
        give {it} weaker colours
        ~ calm the colours down
        ~ wash out the colours
    """,
    "warmer": """
        make {it} warmer
        warm up the {pic}
        warmer [colours|tones|light]
        add warmth to the {pic}
        give {it} a warm [tone|look]
        shift the colours to yellow and orange
        raise the colour temperature
        {it} should look warmer
        {it} [looks|is] too cold
        tint the {pic} warm
        more warmth
        a warm white balance
        ~ it could feel warmer
        ~ pour some golden light over it
    """,
    "cooler": """
        make {it} [cooler|colder]
        cool down the {pic}
        [cooler|colder] [colours|tones|light]
        give {it} a cold [tone|look]
        shift the colours to blue
        lower the colour temperature
        {it} should look cooler
        {it} [looks|is] too warm
        tint the {pic} blue
        add a cool tone to the {pic}
        a cool white balance
        ~ it could feel colder
        ~ pour some icy light over it
    """,
    "sharpen": """
        sharpen {it}
        make {it} [sharper|crisper]
        [increase|raise] the sharpness
        more [sharpness|detail]
        {it} should be sharper
        {it} is [too soft|blurry], sharpen it
        bring out the details
        sharpen the [edges|details]
        a sharper version of the {pic}
        make the edges crisp
        give the {pic} more bite
        ~ it could be crisper
        ~ get the focus right
    """,
    "blur": """
        blur {it}
        make {it} [blurry|blurred]
        [soften|smooth] the {pic}
        put {it} out of focus
        {it} should be blurred
        add [blur|a blur]
        less sharpness
        a blurred version of the {pic}
        make the edges soft
        give the {pic} a soft focus
        defocus the {pic}
        hide the details in a blur
        ~ make it look as through frosted glass
        ~ unfocus the lens
    """,
    "vignette": """
        add a [vignette|dark vignette]
        give {it} a vignette
        darken the [corners|edges|borders]
        make the corners [dark|darker]
        put a vignette around the {pic}
        let the {pic} fade to dark at the edges
        shade the corners
        apply a vignette
        I want dark corners
        the borders should be darker
        frame the {pic} with darkness
        vignette effect
        ~ draw the eye to the middle with dark edges
        ~ let the light fall off to the corners
    """,
    "black_and_white": """
        make {it} black and white
        [turn|convert|change] {it} [to|into] black and white
        [remove|take away] the colour
        make {it} [grey|monochrome]
        turn {it} into a black and white {pic}
        no colours
        black and white
        in greyscale
        give me a monochrome version
        convert the {pic} to grey tones
        drain all colour from the {pic}
        {it} should be in black and white
        ~ as if shot on black and white film
        ~ strip the colours
    """,
    "sepia": """
        make {it} sepia
        give {it} a sepia [tone|look]
        [turn|change] {it} to sepia
        apply a sepia [filter|effect]
        add a sepia tone
        tone the {pic} brown like a very old photograph
        sepia
        convert the {pic} to sepia
        in sepia colours
        I want it in sepia
        {it} should be in brown sepia tones
        brown tones like from 1900
        ~ as if taken a hundred years ago
        ~ like grandmother's first photograph
    """,
    "vintage": """
        make {it} look [vintage|retro]
        give {it} a [vintage|retro] look
        apply a [vintage|retro] filter
        make {it} look like an old colour film
        a faded film look
        fade {it} like an old print
        turn {it} into a vintage {pic}
        like a faded postcard
        I want a retro style
        add a vintage effect
        let the {pic} look faded
        {it} should look like from the seventies
        ~ as if the print had lain in the sun
        ~ a nostalgic film look
    """,
    "professional": """
        make {it} [professional|look professional]
        make {it} look like a professional {pic}
        [enhance|optimize|improve] the {pic}
        auto levels
        [retouch|polish] the {pic}
        improve the quality of the {pic}
        make the {pic} look better
        give {it} a professional touch
        fix the levels
        auto enhance
        bring the {pic} up to magazine quality
        correct the tones of the {pic}
        ~ as if a professional had edited it
        ~ get this ready for print
    """,
    "fix_light": """
        {it} is {fault}, fix it
        the {pic} is {fault}
        {it} came out {fault}
        correct the exposure: it is {fault}
        the light is {fault}, make it {remedy}
        it should be {remedy} so that the light is right
        my {pic} is {fault}, please correct it
        repair this {fault} {pic}
        save this {fault} {pic}
        it was exposed wrongly and is {fault}
        {fault}! correct that
        undo the wrong exposure, it is {fault}
        the exposure is off: {fault}
        rescue the {pic}, it turned out {fault}
        ~ sadly {it} is {fault}
        ~ it is far {fault} to show around
    """,
    "fix_colors": """
        the colours are {fault}, fix them
        the {pic} is {fault}
        {it} came out {fault}
        correct the colours: they are {fault}
        the colours are off, make them {remedy}
        they should be {remedy} so that the colours are right
        my {pic} is {fault}, please correct the colours
        repair the colours of this {fault} {pic}
        the white balance is wrong: {fault}
        it has a bad cast and is {fault}
        everything looks {fault}
        {fault}! correct that
        get the colours back to normal, they are {fault}
        rescue the {pic}, it turned out {fault}
        ~ sadly the colours are {fault}
        ~ the camera made it {fault}
    """,
    "denoise": """
        remove the [noise|grain]
        [denoise|clean] the {pic}
        clean up the [noise|grain]
        the {pic} is too [noisy|grainy]
        take away the grain
        make {it} less [noisy|grainy]
        reduce the noise
        smooth out the noise
        I don't want this grain
        get rid of the [speckles|noise]
        a clean version without noise
        no grain, please
        ~ it looks like shot at high ISO, fix that
        ~ calm down this speckled {pic}
    """,
    # ---- light, season, weather, states
    "night": """
        make it night
        turn [day into night|it into night|it to night]
        change the time to night
        it should be night
        at night
        show it at [night|midnight]
        let the night fall
        as if it were taken at night
        what would it look like at night?
        make it a night [scene|{pic}]
        I want to see the stars
        after dark
        ~ turn off the daylight
        ~ the same place in the middle of the night
    """,
    "day": """
        make it [day|daytime]
        turn it [to|into] day
        change the time to day
        it should be [day|noon]
        by day
        show it [by day|in daylight|at noon]
        let the day break
        as if it were taken by day
        what would it look like by day?
        make it a day scene
        I want daylight
        in broad daylight
        ~ let the sun be high
        ~ the same place at noon
    """,
    "dusk": """
        make it [dusk|evening|sunset]
        turn it [to|into] [evening|sunset]
        change the time to [dusk|sunset]
        it should be evening
        at [dusk|sunset]
        show it at sunset
        let the sun set
        as if it were taken at sunset
        what would it look like in the evening?
        make it a sunset scene
        I want an evening sky
        in the evening light
        ~ let the last light of the day shine
        ~ the same place as the sun goes down
    """,
    "spring": """
        make it spring
        turn it [to|into] spring
        change the season to spring
        it should be spring
        in spring
        show it in [spring|April|May]
        let spring come
        as if it were taken in spring
        what would it look like in spring?
        let the trees bloom
        I want [blossoms|spring flowers]
        make everything blossom
        make it a spring scene
        ~ let the flowers come out
        ~ the same place in the blooming season
    """,
    "summer": """
        make it summer
        turn it [to|into] summer
        change the season to summer
        it should be summer
        in summer
        show it in [summer|July|August]
        let summer come
        as if it were taken in summer
        what would it look like in summer?
        let the trees be green
        I want a summer day
        make everything lush and green
        make it a summer scene
        ~ let it be the holidays in July
        ~ the same place in the warmest season
    """,
    "autumn": """
        make it [autumn|fall]
        turn it [to|into] autumn
        change the season to autumn
        it should be autumn
        in autumn
        show it in [autumn|October|November]
        let autumn come
        as if it were taken in autumn
        what would it look like in autumn?
        let the leaves turn [orange|brown and red]
        I want autumn leaves
        make it an autumn scene
        colour the leaves as in October
        ~ let the leaves fall
        ~ the same place when the leaves turn
    """,
    "winter": """
        make it winter
        turn it [to|into] winter
        change the season to winter
        it should be winter
        in winter
        show it in [winter|January|December]
        let winter come
        as if it were taken in winter
        what would it look like in winter?
        cover [the ground|everything] with snow
        I want a white winter landscape
        put snow on the ground and the roofs
        make it a winter scene
        ~ let it be Christmas time
        ~ the same place in the coldest season
    """,
    "clear": """
        make the {was} go away
        [remove|clear away] the {was}
        stop the {was}
        make the sky [clear|blue]
        I want [clear weather|good weather|sunshine]
        no more {was}
        let the sky clear up
        clear the sky
        a clear sky instead of {was}
        better weather without {was}
        fine weather
        turn the {was} into a clear sky
        it should be clear
        ~ let the sun come out again
        ~ as if there had never been {was}
    """,
    "cloudy": """
        make it [cloudy|overcast]
        add [clouds|grey clouds|heavy clouds]
        cover the sky with clouds
        it should be [cloudy|overcast]
        a cloudy sky
        let clouds cover the sky
        hide the sky behind clouds
        I want a grey sky
        turn the weather cloudy
        fill the sky with clouds
        on a cloudy day
        make the sky grey
        ~ let the sky be heavy
        ~ dull grey weather
    """,
    "rain": """
        make it rain
        let it rain
        add [rain|raindrops|falling rain]
        it should [rain|be raining]
        in the rain
        turn the weather [to rain|rainy]
        make it a rainy [day|scene]
        I want rain
        show it in the rain
        let rain fall
        as if it were raining
        rainy weather
        ~ what would it look like in a shower?
        ~ wet weather with drops
    """,
    "snow": """
        make it snow
        let it snow
        add [falling snow|snowflakes|snowfall]
        it should [snow|be snowing]
        in falling snow
        turn the weather to snow
        make it a snowy [day|scene]
        I want snowflakes in the air
        show it in a snowfall
        let snow fall
        as if it were snowing
        snowy weather
        ~ what would it look like in a snowstorm?
        ~ let the flakes dance
    """,
    "fog": """
        make it [foggy|misty]
        add [fog|mist|thick fog]
        it should be [foggy|misty]
        in the fog
        turn the weather foggy
        make it a foggy [day|scene]
        I want fog
        show it in thick fog
        let the fog come in
        cover [it|everything] in fog
        as if there were fog
        foggy weather
        ~ what would it look like in the mist?
        ~ let everything fade in haze
    """,
    "rainbow": """
        add a rainbow
        put a rainbow [in|into] the sky
        there should be a rainbow
        I want a rainbow
        [draw|paint] a rainbow in the sky
        let a rainbow appear
        show a rainbow above the land
        a rainbow in the sky, please
        make a rainbow appear
        place a rainbow over the scene
        add an arch of all colours to the sky
        give the sky a rainbow
        with a rainbow
        ~ what if there were a rainbow?
        ~ let the sky show all its colours in a bow
    """,
    "lights_on": """
        [turn|switch|put] on {lights}
        [turn|switch] {lights} on
        light {lights}
        {lights} should be on
        let there be light: {lights} on
        make {few} shine
        let {few} glow
        I want {few} to be lit
        {lights} should shine
        make {few} light up
        illuminate the place with {few}
        put the light on: {few}
        ~ could {lights} be on?
        ~ start {few}
    """,
    "lights_off": """
        [turn|switch|put] off {lights}
        [turn|switch] {lights} off
        put out {few}
        {lights} should be off
        lights out: {lights}
        make {few} go dark
        let {few} go out
        I want {few} to be dark
        {lights} should not shine
        extinguish {few}
        shut off {few}
        save power and turn off {few}
        ~ could {lights} be off?
        ~ {lights} should stop shining
    """,
    "open_door": """
        open the door
        [open|unlock] the door of {the}
        the door of {the} should be open
        let the door of {the} stand open
        leave the door of {the} open
        make the door of {the} open
        {the} with an open door
        I want the door of {the} open
        swing the door of {the} open
        show {the} with the door open
        pull open the {door} door of {the}
        the {door} door should be open
        ~ somebody has opened the door of {the}
        ~ let fresh air into {the} through the door
    """,
    "close_door": """
        close the door
        [close|shut|lock] the door of {the}
        the door of {the} should be [closed|shut]
        keep the door of {the} closed
        make the door of {the} closed
        {the} with a closed door
        I want the door of {the} shut
        swing the door of {the} shut
        show {the} with the door closed
        pull shut the {door} door of {the}
        the {door} door should be closed
        ~ somebody has closed the door of {the}
        ~ keep the cold out of {the} by the door
    """,
    "light_fire": """
        light the fireplace in {the}
        let smoke rise from the chimney of {the}
        [add|put] smoke to the chimney of {the}
        make a fire in {the}
        the chimney of {the} should smoke
        make the chimney of {the} smoke
        {the} should have smoke above its chimney
        I want smoke from the chimney of {the}
        show smoke above {the}
        heat {the} with a fire
        let the chimney of {the} smoke
        smoke from the chimney of {the}, please
        start a fire in the fireplace of {the}
        ~ somebody in {the} should light the stove
        ~ what if the chimney of {the} smoked?
    """,
}

AMBIGUOUS_WORDINGS: dict[str, str] = {
    "remove_it": """
        remove it
        take it away
        get rid of it
        remove what is in front
        clear the foreground
        it should go
        [delete|erase] the thing in front
        take away what is in the foreground
        without the thing in front
        nothing should be in the foreground
        make it disappear
        empty the front
        ~ what stands in front must go
        ~ free the view
    """,
    "larger": """
        make it bigger
        make the thing in front [bigger|larger]
        [enlarge|grow] it
        it should be [bigger|larger]
        it is too small
        bigger, please
        scale it up
        let it grow
        a bigger one
        enlarge what is in front
        more of it in size
        the thing in front is too small
        ~ it could be bigger
        ~ blow it up in size
    """,
    "smaller": """
        make it smaller
        make the thing in front [smaller|tinier]
        [shrink|reduce] it
        it should be smaller
        it is too [big|large]
        smaller, please
        scale it down
        let it shrink
        a smaller one
        shrink what is in front
        the thing in front is too big
        ~ it could be smaller
        ~ bring it down in size
    """,
    "one_more": """
        one more
        [add|I want] one more [like it|like that]
        another one
        [add|put] a second one
        make two of them
        double it
        copy it
        it needs company of its own kind
        the same thing again
        let there be two
        give it a twin
        put another one beside it
        ~ one is not enough
        ~ once more the same
    """,
    "other_side": """
        move it to the other side
        put it on the other side
        to the other side
        it should be on the other side
        bring it over to the opposite side
        change sides
        move the thing in front across
        the other side would be better
        it stands on the wrong side
        take it across
        shift it to the opposite edge
        swap its side
        let it change sides
        ~ it belongs on the other side
        ~ over there instead
    """,
    "match_house": """
        make it match the house
        the same colour as the house
        paint it like the house
        let it fit the house
        it should have the colour of the house
        make {the} match the house
        give it the colour of the house
        {the} in the colour of the house
        like the house
        adapt its colour to the house
        make {the} the same colour as the house
        match the colour of the walls
        paint {the} like the house
        take the colour of the house for it
        ~ it should go with the house
        ~ the house and it in one colour
    """,
    "match_other": """
        the same as {other}
        make it the same colour as {other}
        let it match {other}
        give it the colour of {other}
        make {the} match {other}
        {the} in the same colour as {other}
        paint it like {other}
        paint {the} like {other}
        like {other}
        it should have the colour of {other}
        {the} should be like {other} in colour
        both in the colour of {other}
        use the colour of {other} for {the}
        adapt its colour to {other}
        ~ it should go with {other}
        ~ two of a colour: take that of {other}
    """,
    "other_color": """
        make the {side} the other colour
        the other colour for the {side}
        give the {side} the other colour
        the {side} in the other colour
        paint the {side} like the other one
        make the {side} look like the other one
        make both alike: change the {side}
        the {side} should have the other colour
        the {side} should match the other one
        change the {side} to the colour of its twin
        let the {side} be as the other one
        use the other colour for the {side}
        the {side} in the same colour as the other
        paint the {side} in the colour of the second one
        ~ the {side} should go with its twin
        ~ a pair in one colour: change the {side}
    """,
    "odd_one": """
        remove the odd one
        remove the odd one out
        take away what does not fit
        one does not belong to the others, remove it
        keep only the two that are alike
        get rid of the odd one
        the odd one should go
        delete the one that is different
        take away the stranger
        only the pair should stay
        leave the pair, remove the rest
        remove what differs
        erase the one that is not like the others
        one of the three is wrong, take it out
        ~ which one is different? remove it
        ~ the outsider must go
    """,
    "swap_them": """
        swap them
        let them change places
        the other way round
        [exchange|switch] them
        swap the two in front
        they should trade places
        switch their positions
        change the order
        each in the place of the other
        reverse their order
        swap left and right in front
        exchange the places of the two
        the two in front should swap
        switch the two around
        ~ they stand the wrong way round
        ~ let each go where the other is
    """,
    "swap_their_colors": """
        swap their colours
        let them trade colours
        [exchange|switch] their colours
        each in the colour of the other
        swap the colours of the two in front
        they should change colours
        switch the two colours
        the colours the other way round
        paint each like the other
        exchange the colours of the two
        give each the colour of the other one
        the two in front should swap colours
        interchange their colours
        trade the colours of these two
        ~ the colours are the wrong way round
        ~ let them borrow each other's colour
    """,
    "turn_on": """
        turn it on
        switch it on
        light it
        it should be on
        on, please
        turn the light on
        make it shine
        it is off, turn it on
        put it on
        let it shine
        let it glow
        light up what is still dark
        turn on what is off
        I want it lit
        ~ more light from where it is missing
        ~ it should not stay dark
    """,
    "turn_off": """
        turn it off
        switch it off
        put it out
        it should be off
        off, please
        turn the light off
        make it go dark
        it is on, turn it off
        let it go out
        no light there
        turn off what is on
        I want it dark
        shut it off
        lights out
        ~ it should not shine
        ~ nobody needs this light
    """,
    "toggle_lights": """
        flip the light switch
        [toggle|flip] the lights
        change the state of the lights
        the lights the other way
        use the light switch
        press the switch
        the opposite for the lights
        invert the lights
        operate the switch
        the lights should be the other way round
        hit the light switch
        change the lights
        switch the lights over
        reverse the lights
        ~ someone has pressed the switch
        ~ the lights as they are not now
    """,
    "cosy": """
        make it more cosy
        make it [cosy|cosier]
        more [cosiness|comfort]
        it should feel cosy
        I want it to feel like home
        make it feel homely
        give it a cosy mood
        a cosy atmosphere
        make it inviting
        it should be snug
        more comfort and calm
        let it look like a place to stay
        turn it into a snug place
        set a cosy mood
        ~ it is not cosy enough
        ~ make one want to come in
    """,
    "fix_weather": """
        change the weather
        I don't like this weather
        another weather
        the opposite weather
        other weather, please
        let the weather change
        turn the weather around
        make the weather different
        the weather should be different
        switch the weather
        swap the weather
        it is the wrong weather
        reverse the weather
        let the weather turn
        ~ enough of this weather
        ~ the weather forecast was wrong
    """,
    "half_a_year": """
        half a year later
        undo the season
        the opposite season
        six months later
        show it in half a year
        let half a year pass
        the other half of the year
        turn the season around
        the season that is farthest away
        as it was half a year ago
        reverse the season
        go six months on
        two seasons later
        in the opposite time of year
        ~ let two seasons pass
        ~ turn the calendar by six months
    """,
    "next_season": """
        the next season
        one season later
        three months later
        let a season pass
        go on to the next season
        show the season that follows
        what comes after this season?
        let three months pass
        turn to the next season
        move the calendar on by a season
        make it one season later
        let the next season come
        go three months on
        the season after this one
        ~ wait for the next season
        ~ a quarter of a year later
    """,
    "half_a_day": """
        twelve hours later
        half a day later
        flip day and night
        the opposite time of day
        turn the clock by twelve hours
        let twelve hours pass
        show it half a day later
        reverse day and night
        twelve hours on
        swap day and night
        the other half of the day
        let half a day pass
        as it was twelve hours ago
        exchange day and night
        ~ move the clock on by half a day
        ~ when the other shift works
    """,
    "fix_light": """
        fix the light
        correct the exposure
        the light is wrong
        repair the exposure
        get the light right
        the exposure is off
        balance the light
        make the light right
        set the right exposure
        the brightness is wrong
        correct the brightness
        fix the exposure
        adjust the light as it should be
        something is wrong with the light
        ~ the camera got the light wrong
        ~ rescue the exposure
    """,
    "fix_colors": """
        fix the colours
        correct the colours
        the colours are wrong
        fix the white balance
        get the colours right
        the colours are off
        balance the colours
        make the colours right
        repair the colours
        something is wrong with the colours
        set the right colours
        natural colours, please
        adjust the colours as they should be
        make the colours look natural
        ~ the camera got the colours wrong
        ~ rescue the colours
    """,
    "the_door": """
        use the door
        the door, please
        move the door
        change the state of the door
        the door the other way
        operate the door
        swing the door
        the opposite for the door
        change the door from what it is now
        the door should be the other way
        turn the door on its hinges
        flip the door
        push the door
        someone has used the door
        ~ somebody came through the door
        ~ the door as it is not now
    """,
}
